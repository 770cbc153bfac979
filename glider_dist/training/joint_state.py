"""What joint training has learnt, as whole tensors of single experts: no trace of stages, ranks or padding.

Of an expert's site there are ``SITE.A`` ``[r, d_in]``, ``SITE.B`` ``[r, d_out]`` (transposed, as in a SiteBank)
and ``SITE.gate`` ``[d_in]``, of those that train; and of each, as ``NAME.exp_avg`` and ``NAME.exp_avg_sq``,
AdamW's moments. The number of updates is ``engine.steps``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from glider_dist.training.deepspeed_moe import MOMENTS, ExpertEngine
from glider_dist.training.joint_params import Tensors, Trained


def gather_state(
    engine: ExpertEngine, trained: Trained, moments: bool = True, keep: bool = True
) -> dict[str, Tensors]:
    """The trained experts that this rank owns, by name; a collective.

    The ranks of an expert-parallel group together have all of them, once; replicas have the same.

    Args:
        moments: with AdamW's moments.
        keep: whether this rank has a use for them; where not, it takes part for the others and gets none.

    Returns:
        ``{expert: {name: tensor}}`` on the CPU, in the training dtype; no tensor shares memory with another.
    """
    own = trained.own if keep else ()
    found: dict[str, Tensors] = {trained.names[expert]: {} for expert in own}
    for key in (*trained.experts, *trained.gates):
        for moment in (None, *MOMENTS) if moments else (None,):
            whole = engine.full(key, moment)
            whole = whole.cpu() if own else whole
            for expert in own:
                if (part := trained.part(key, expert, whole)) is not None:
                    name = key if moment is None else f"{key}.{moment}"
                    found[trained.names[expert]][name] = part.clone()
    return found


def load_state(engine: ExpertEngine, trained: Trained, read: Callable[[str], Mapping[str, torch.Tensor]]) -> None:
    """Put back what :func:`gather_state` gave, on any number of ranks, stage and placement; a collective.

    Args:
        read: from an expert's name to its tensors, with moments; asked for the experts that this rank owns, and
            for the gates of all.
    """
    for key, like in (*trained.experts.items(), *trained.gates.items()):
        for moment in (None, *MOMENTS):
            whole = torch.zeros_like(like, device="cpu")
            for expert in trained.own if key in trained.experts else trained.chosen:
                part = trained.part(key, expert, whole)
                tensor = read(trained.names[expert]).get(key if moment is None else f"{key}.{moment}")
                # An expert has no gate where it does not adapt the site.
                if part is not None and tensor is not None:
                    part.copy_(tensor)
            engine.set_full(key, whole, moment)
