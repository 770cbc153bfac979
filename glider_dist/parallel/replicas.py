"""Ranks that train the same experts, each on its part of every step's rows, and sum the gradients.

Consecutive ranks are replicas of each other, so that with as many of them as a node has their sums stay inside it.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from glider_dist.errors import GliderError
from glider_dist.parallel.mesh import timeout_of_world
from glider_dist.parallel.ranks import Ranks

T = TypeVar("T", bound=Sized)


@dataclass(frozen=True)
class Replicas:
    """This rank among the replicas that train the same experts.

    Attributes:
        team, teams: which of the job's sets of replicas this is, and how many there are.
        place, count: position in it and its size.
        group: its process group; None if it is one rank.
    """

    team: int = 0
    teams: int = 1
    place: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this rank writes the files for all of them."""
        return self.place == 0

    def part(self, rows: Sequence[T], turn: int) -> list[T]:
        """This rank's rows: like numbers and lengths for all, the remainder going round with ``turn``."""
        if self.count == 1:
            return list(rows)
        return sorted(rows, key=len, reverse=True)[(self.place + turn) % self.count :: self.count]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place over the replicas, and return it: the same bits on all of them."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest(self, value: int, device: torch.device) -> int:
        """The largest ``value`` of the replicas."""
        if self.group is None:
            return value
        tensor = torch.tensor(value, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return int(tensor)


SINGLE = Replicas()
"""A rank that trains its experts by itself."""


def divide(ranks: Ranks, count: int) -> Replicas:
    """Divide the ranks into teams of ``count`` replicas; it divides their number. All ranks call it together."""
    if count == 1:
        return Replicas(ranks.rank, ranks.world)
    own: dist.ProcessGroup | None = None
    for start in range(0, ranks.world, count):
        group = dist.new_group(list(range(start, start + count)), timeout_of_world())
        own = group if start <= ranks.rank < start + count else own
    return Replicas(ranks.rank // count, ranks.world // count, ranks.rank % count, count, own)


def check_replica_count(count: int, world: int) -> None:
    """Raises GliderError if the ranks cannot be divided so."""
    if world % count:
        divisors = ", ".join(str(size) for size in range(1, world + 1) if world % size == 0)
        raise GliderError(
            f"train.replicas={count} does not divide the {world} ranks of this job; choose one of {divisors}"
        )
