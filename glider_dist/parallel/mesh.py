"""The mesh: world = expert parallel × data parallel.

Consecutive ranks form an expert-parallel group, which together holds every expert once; with as many ranks per
node as the group has, its exchanges stay inside a node. Ranks at the same place of their groups hold the same
experts: they are replicas, between which expert gradients are summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from glider_dist.errors import GliderError
from glider_dist.parallel.exchange import all_gather_rows
from glider_dist.parallel.placement import Placement


@dataclass(frozen=True)
class Mesh:
    """This rank's place.

    Attributes:
        expert_parallel: P, ranks that share one copy of the pool.
        data_parallel: copies of the pool.
        rank: global rank.
        expert_ranks: global ranks of this rank's expert-parallel group, in order.
        replica_ranks: global ranks that hold the same experts as this one, in order.
        expert_group: group of ``expert_ranks``; None if P is 1.
        replica_group: group of ``replica_ranks``; None if there is one copy.
    """

    expert_parallel: int
    data_parallel: int
    rank: int
    expert_ranks: tuple[int, ...]
    replica_ranks: tuple[int, ...]
    expert_group: dist.ProcessGroup | None
    replica_group: dist.ProcessGroup | None

    @property
    def expert_rank(self) -> int:
        """Position in the expert-parallel group."""
        return self.rank % self.expert_parallel

    def __str__(self) -> str:
        return f"{self.expert_parallel} expert parallel x {self.data_parallel} data parallel"


def init_mesh(expert_parallel: int = 1) -> Mesh | None:
    """Divide the ranks into expert-parallel groups. Every rank calls it once, after torch.distributed started.

    Returns:
        None in a single process.

    Raises:
        GliderError: ``expert_parallel`` does not divide the number of ranks.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if expert_parallel < 1 or world % expert_parallel:
        divisors = [str(size) for size in range(1, world + 1) if world % size == 0]
        raise GliderError(
            f"mesh.expert_parallel={expert_parallel} does not divide the {world} ranks of this job; "
            f"choose one of {', '.join(divisors)}"
        )
    if world == 1:
        return None
    rank = dist.get_rank()
    groups = [tuple(range(start, start + expert_parallel)) for start in range(0, world, expert_parallel)]
    replicas = [tuple(range(place, world, expert_parallel)) for place in range(expert_parallel)]
    # Every rank makes every group, in the same order.
    timeout = timeout_of_world()
    made = {ranks: dist.new_group(list(ranks), timeout) for ranks in [*groups, *replicas] if len(ranks) > 1}
    own, same = groups[rank // expert_parallel], replicas[rank % expert_parallel]
    return Mesh(expert_parallel, len(groups), rank, own, same, made.get(own), made.get(same))


def timeout_of_world() -> timedelta | None:
    """What ``init_process_group`` was given: a new group would take its backend's default instead."""
    world = dist.group.WORLD
    assert world is not None
    backend = world._get_backend(torch.device("cuda" if dist.get_backend() == "nccl" else "cpu"))
    return getattr(backend.options, "_timeout", None)


def gather_rows(own: dict[str, torch.Tensor], mesh: Mesh, placement: Placement) -> dict[str, torch.Tensor]:
    """From ``{site: [e, d]}`` of each rank's own experts to ``{site: [E, d]}`` of all, in order of their ids."""
    if mesh.expert_group is None:
        return own
    most = max(len(placement.owned(rank)) for rank in range(placement.ranks))
    order = torch.tensor(
        [owner * most + slot for owner, slot in zip(placement.owner, placement.slot, strict=True)],
        dtype=torch.int64,
    )
    found = {}
    for site, rows in own.items():
        padded = rows.new_zeros(most, rows.shape[1])
        padded[: len(rows)] = rows
        everyone = all_gather_rows("prototypes", padded.flatten(), mesh.expert_group)
        found[site] = everyone.view(-1, rows.shape[1])[order.to(rows.device)]
    return found
