"""What all stages of a plan share: the base, its sites, the experts, the ranks and their mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.job import with_base
from glider_dist.model.base import BaseModel
from glider_dist.model.batch import Collator, Encoded
from glider_dist.model.engine import FrozenBase
from glider_dist.model.quantised import quantised_bytes
from glider_dist.model.sites import linear_sites
from glider_dist.model.zero import gathered_bytes, shard_bytes
from glider_dist.parallel.mesh import Mesh
from glider_dist.parallel.placement import Placement, place
from glider_dist.parallel.ranks import ALONE
from glider_dist.planning.base import meta_base, on_device
from glider_dist.planning.ranks import meshes
from glider_dist.planning.trace import Trace, fused_attention
from glider_dist.pool import ExpertPool

META = torch.device("meta")


@dataclass(frozen=True)
class Experts:
    """Names, and the largest LoRA rank of any."""

    names: tuple[str, ...]
    rank: int


class Target:
    """What is planned for.

    Args:
        world: ranks of the job; None: nodes times GPUs per node.

    Raises:
        GliderError: the base or the number of experts is unknown, or the mesh does not divide the ranks.
    """

    def __init__(self, cfg: Config, world: int | None = None):
        plan = cfg.plan
        self.cfg = cfg = with_base(cfg)
        self.world = world or plan.nodes * plan.gpus_per_node
        self.node = min(plan.gpus_per_node, self.world)
        self.experts = _experts(cfg)
        self.meshes = meshes(self.world, cfg.mesh.expert_parallel)
        self.base: BaseModel = meta_base(cfg)
        self.shapes = self.sites()
        self.device = torch.device(on_device(cfg))
        self.collator = Collator(self.base, cfg.tasks.max_length)
        self.frozen = FrozenBase(self.base, ALONE, 0)

    @property
    def expert_parallel(self) -> int:
        return self.cfg.mesh.expert_parallel

    @property
    def sharded(self) -> bool:
        """Whether ZeRO 3 shards the base."""
        return self.cfg.zero_stage == 3 and self.world > 1

    @cached_property
    def placement(self) -> Placement:
        mesh = self.cfg.mesh
        return place(self.experts.names, mesh.expert_parallel, mesh.placement, mesh.load)

    @property
    def most_owned(self) -> int:
        """Experts that a rank owns at most."""
        return max(map(self.placement.owner.count, range(self.placement.ranks)))

    @property
    def mesh(self) -> Mesh | None:
        """Rank 0's."""
        return self.meshes[0]

    @property
    def reserve(self) -> int:
        """Bytes of the device for what is not counted."""
        return round(self.cfg.plan.reserve_gb * 1e9) if self.device.type == "cuda" else 0

    def base_bytes(self) -> dict[str, int]:
        """What the frozen base takes on a rank."""
        model = self.base.model
        if not self.sharded:
            bits = self.cfg.base_bits
            return {"base": quantised_bytes(model, bits) if bits else self.frozen.nbytes}
        return {"base": shard_bytes(model, self.world), "base, gathered": gathered_bytes(model)}

    def loading_bytes(self) -> dict[str, int]:
        """What the base takes on the host at most, for as long as it loads: under ZeRO 3 rank 0 reads all of its
        files for everyone. They are taken to have the dtype in which it computes; pages of mapped ones may be
        dropped meanwhile."""
        return {"base while it loads, rank 0": self.frozen.nbytes} if self.sharded else {}

    def index_bytes(self) -> int:
        """What the global router's index takes on the host: an fp32 vector per description."""
        cfg = self.cfg
        return len(self.experts.names) * cfg.describe.descriptions * cfg.plan.embedding_width * 4

    def row(self) -> Encoded:
        """The longest example: the base reads and answers ``tasks.max_length`` tokens."""
        answer = min(self.cfg.plan.answer_tokens, self.cfg.tasks.max_length - 1)
        prompt = self.cfg.tasks.max_length - (0 if self.collator.seq2seq else answer)
        return Encoded((0,) * prompt, (0,) * answer)

    def sites(self) -> dict[str, tuple[int, int]]:
        """``{site: (d_out, d_in)}`` of the base as it is now, which may lack blocks while it is measured."""
        targets = self.cfg.lora.targets
        return {name: site.shape for name, site in linear_sites(self.base.model, targets).items()}

    def trace(self, work: Callable[[], object], known: list[torch.Tensor]) -> Trace:
        """Run ``work`` on the meta device; tensors in ``known`` and the base's weights are not counted."""
        model = self.base.model
        with fused_attention(), Trace([*model.parameters(), *model.buffers(), *known]) as trace:
            handle = model.register_forward_hook(lambda *_: trace.keep())
            try:
                work()
            finally:
                handle.remove()
        return trace


def _experts(cfg: Config) -> Experts:
    plan = cfg.plan
    if plan.experts is None and cfg.pool is not None and (Path(cfg.pool) / "pool.json").exists():
        pool = ExpertPool.open(cfg.pool)
        summaries = [expert.summary(expert.card()) for expert in pool.experts()]
        if summaries:
            return Experts(pool.names, max(summary["rank"][1] for summary in summaries))
    names = tuple(f"expert_{index}" for index in range(plan.experts or 0)) or tuple(cfg.tasks.held_in)
    if not names:
        raise GliderError("plan: how many experts? set plan.experts, or name a pool or tasks.held_in")
    return Experts(names, cfg.lora.rank)
