"""The frozen base in a DeepSpeed engine: replicated on every rank, or sharded over the ranks by ZeRO 3.

There is no optimizer: experts live outside the engine's module tree and train by themselves. Under ZeRO 3, and
where ranks share the experts, a forward is a collective, so all ranks must run the same number in the same order;
``turn`` makes them agree before each one, and a rank without work runs a dummy.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from glider_dist.errors import GliderError
from glider_dist.model.attach import shares_experts
from glider_dist.model.base import BaseModel
from glider_dist.model.zero import base_config, import_deepspeed
from glider_dist.parallel.ranks import Ranks

log = logging.getLogger(__name__)

IDLE, FORWARD, BACKWARD, GENERATE, STOP = range(5)
_GENERATE_LIMIT_BYTES = 4 << 30


class FrozenBase:
    """The base model, ready to run on this rank.

    Attributes:
        model: the Hugging Face model to call (not the engine, which refuses a backward without an optimizer).
        sharded: True under ZeRO 3.
    """

    def __init__(self, base: BaseModel, ranks: Ranks, zero_stage: int):
        self.model: Any = base.model
        self.ranks = ranks
        # Nothing here has gradients or an optimizer that stages 1 and 2 could shard.
        zero_stage = zero_stage if zero_stage == 3 else 0
        self.sharded = zero_stage == 3 and ranks.world > 1
        self.nbytes = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.model.parameters())
        if ranks.world > 1:
            self.engine = _engine(self.model, zero_stage, base.dtype)

    @property
    def lockstep(self) -> bool:
        """Whether forwards are collectives: under ZeRO 3, and while ranks share the attached experts."""
        return self.sharded or shares_experts(self.model)

    @property
    def local_bytes(self) -> int:
        """Bytes of the base's parameters that this rank keeps."""
        return sum(getattr(p, "ds_tensor", p).nbytes for p in self.model.parameters())

    def turn(self, kind: int) -> int:
        """What all ranks run now: the largest kind any of them asks for. Free of cost where each rank
        has a base and all experts of its own.

        After :data:`STOP` no rank runs anything more.
        """
        if not self.lockstep:
            return kind
        if kind == GENERATE and self.sharded:
            check_generation(self.nbytes)
        agreed = self.ranks.largest(kind)
        if agreed == STOP:
            return STOP
        if GENERATE in (agreed, kind) and kind not in (agreed, IDLE):
            raise GliderError("some ranks generate while others score; run the same stage on all ranks")
        return agreed

    def drain(self, dummy: Callable[[int], None]) -> None:
        """Run ``dummy(kind)`` until every rank is out of work, or one of them wishes to stop."""
        while (kind := self.turn(IDLE)) not in (IDLE, STOP):
            dummy(kind)


def check_generation(nbytes: int) -> None:
    """Raises GliderError if a base of so many bytes is too large to generate under ZeRO 3."""
    if nbytes > _GENERATE_LIMIT_BYTES:
        raise GliderError(
            f"generation under ZeRO 3 gathers the whole base ({nbytes / 2**30:.1f} GiB) for every token; "
            "use zero_stage=0, a quantised base, or rank classification"
        )


def _engine(model: nn.Module, zero_stage: int, dtype: torch.dtype) -> Any:
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist.get_backend(), verbose=False)
    # The bf16 wrapper prints a memory report for an optimizer that does not exist here.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, config=base_config(zero_stage, dtype))
    return engine
