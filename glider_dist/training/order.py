"""Which rank trains which expert, and which examples each of its steps sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from glider_dist.seed import seed_of


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


def replicas_for(costs: Sequence[float], world: int, rows: int) -> int:
    """Ranks that train each expert together: the fewest with which the busiest has at most half more to do than
    the mean. More than needed would split rows that fill a forward, and move gradients.

    Args:
        costs: of the experts.
        world: ranks; the result divides it.
        rows: of a step, at most so many replicas; none is without rows then.
    """
    mean = sum(costs) / world
    fitting = [count for count in range(1, world + 1) if world % count == 0 and count <= rows]
    for count in fitting:
        busiest = max(sum(costs[i] for i in part) for part in share_out(costs, world // count)) / count
        if busiest <= 1.5 * mean:
            return count
    return fitting[-1]
