"""Forwards and backwards of one rank's experts, in step with the other ranks where a forward is common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from glider_dist.lora.bank import SiteBank
from glider_dist.model.attach import assign_experts, context_of, detach, install
from glider_dist.model.batch import Batch, Collator, target_nll
from glider_dist.model.engine import BACKWARD, FORWARD, IDLE, STOP, FrozenBase
from glider_dist.model.recompute import recomputed
from glider_dist.training.batches import MicroBatch
from glider_dist.training.slots import Slots


@contextmanager
def installed(
    model: Any,
    names: tuple[str, ...],
    seen: tuple[dict[str, SiteBank], dict[str, torch.Tensor]],
    gated: bool,
    checkpointing: bool,
) -> Iterator[None]:
    """Put experts into the base for training, and take them out again.

    Args:
        seen: banks and gates.
        gated: weight them with ``σ(v·u)`` (gate training).
        checkpointing: recompute activations in the backward.
    """
    install(model, names, *seen)
    context_of(model).gated = gated
    try:
        with recomputed(model) if checkpointing else nullcontext():
            yield
    finally:
        detach(model)


def assigned_nll(
    model: Any, batch: Batch, expert_B: torch.Tensor, weight_B: torch.Tensor | None = None
) -> torch.Tensor:
    """Nll per row ``[B]``, each row served by its expert; with weights, the gradient of ``Σ weight · nll`` is
    added to the leaves."""
    with assign_experts(model, expert_B), torch.set_grad_enabled(weight_B is not None):
        nll_B = target_nll(model, batch)
        if weight_B is not None:
            # In here, as checkpointed layers run again in the backward and must find their expert.
            (nll_B * weight_B.to(nll_B, non_blocking=True)).sum().backward()
    return nll_B.detach()


class Runner:
    """Runs micro-batches over the slots of one rank. Counts tokens and padding.

    Attributes:
        tokens, padding, examples: trained on by this process so far.
    """

    def __init__(self, frozen: FrozenBase, collator: Collator, slots: Slots):
        self.frozen = frozen
        self.collator = collator
        self.slots = slots
        self.tokens = 0
        self.padding = 0
        self.examples = 0

    def train(self, micro: MicroBatch, weights: Sequence[float]) -> torch.Tensor:
        """Add the gradients of ``Σ weight · nll`` to the slots; returns the nll of each row ``[B]``."""
        self.frozen.turn(BACKWARD)
        batch = self.collator.batch(micro.items)
        real = sum(map(len, micro.items))
        self.tokens += real
        self.examples += len(micro.items)
        self.padding += batch.tokens - real
        self.slots.serve(context_of(self.frozen.model), micro.lo, micro.hi, collect=True)
        return assigned_nll(
            self.frozen.model, batch, self._experts(micro), torch.tensor(weights, dtype=torch.float64)
        )

    def score(self, micro: MicroBatch) -> torch.Tensor:
        """Nll per row ``[B]`` without a gradient."""
        kind = self.frozen.turn(FORWARD)
        return self._forward_as(kind, self.collator.batch(micro.items), micro.lo, micro.hi, self._experts(micro))

    def idle(self) -> None:
        """Take part in one forward of the other ranks, if it is common (see ``FrozenBase``)."""
        if (kind := self.frozen.turn(IDLE)) not in (IDLE, STOP):
            self._dummy(kind)

    def finish(self) -> None:
        """Take part in the other ranks' collectives until they are done, too."""
        self.frozen.drain(self._dummy)

    def _dummy(self, kind: int) -> None:
        self._forward_as(kind, self.collator.dummy(), 0, 1, torch.zeros(1, dtype=torch.int64))

    def _forward_as(self, kind: int, batch: Batch, lo: int, hi: int, expert_B: torch.Tensor) -> torch.Tensor:
        assert kind != IDLE
        # If some rank trains now, this one joins its backward with a gradient of zero, which is not kept.
        self.slots.serve(context_of(self.frozen.model), lo, hi, collect=False)
        zeros = torch.zeros(expert_B.shape[0]) if kind == BACKWARD else None
        return assigned_nll(self.frozen.model, batch, expert_B, zeros)

    def _experts(self, micro: MicroBatch) -> torch.Tensor:
        return torch.tensor(micro.slots) - micro.lo
