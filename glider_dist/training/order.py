"""Which rank trains which expert, and which examples each of its steps sees."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch


def seed_of(seed: int, *names: str) -> int:
    """A seed that follows from the run's seed and names alone."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def step_indices(seed: int, name: str, examples: int, batch_size: int, steps: int) -> Iterator[list[int]]:
    """The examples of each step: one shuffled epoch after another, cut into batches.

    The order follows from the seed and the expert's name alone, so it is the same wherever and with whomever
    the expert is trained.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, name, "order"))
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting += torch.randperm(examples, generator=generator).tolist()
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def share_out(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Assign work to ranks, the costliest first to the least loaded; ``[ranks]`` lists of positions."""
    loads = [0.0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += costs[index]
        shares[rank].append(index)
    return shares
