"""What an exchange costs either way: the model by which ``auto`` decides. ``probe`` measures its constants.

After the count exchange every rank has the control numbers of all ranks, so all compute the same two times and
decide alike. The time of an exchange is that of its slowest rank:

    time = fixed + bytes / bandwidth + groups · group_s + rows · row_flops / flops + copied / copy

Bytes are the floor, but measured time decides: on gloo the two strategies cross later than their bytes do.

The sums over sites and experts are numpy's; what is left, a dozen numbers a rank, is plain Python: between
exchanges every call into numpy takes some microseconds, and an exchange of a few tokens only some milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Costs:
    """Constants of this machine. The defaults are rough figures of gloo over loopback.

    Attributes:
        tokens_s, weights_s: an exchange of almost nothing, forward, by either strategy.
        tokens_back_s, weights_back_s: its backward.
        bandwidth: bytes per second that a rank sends in an all-to-all.
        flops: floating-point operations per second of a product with LoRA's shapes.
        group_s: one more group of rows in a grouped product, whatever its size.
        copy: bytes per second of gathering and scattering rows.
    """

    tokens_s: float = 1.2e-3
    tokens_back_s: float = 8e-4
    weights_s: float = 1e-3
    weights_back_s: float = 8e-4
    bandwidth: float = 1e9
    flops: float = 3e10
    group_s: float = 4e-6
    copy: float = 3e9


@dataclass(frozen=True)
class Shapes:
    """What the formulas need of the sites that share an input: ``(r, d, o)`` of each, and element sizes."""

    sites: tuple[tuple[int, int, int], ...]
    places: int
    element: int
    weight: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a token on its way out, see :mod:`glider_dist.parallel.tokens`."""
        x = -(-self.sites[0][1] * self.element // 8) * 8
        return -(-(x + self.places * (self.weight + 4)) // 8) * 8

    @property
    def output_bytes(self) -> int:
        return sum(o for _, _, o in self.sites) * self.element

    @property
    def expert_bytes(self) -> Numbers:
        """``[S]``, A and B of one expert at each site."""
        return np.array([r * (d + o) * self.element for r, d, o in self.sites], dtype=np.float64)


def tokens_time(
    costs: Costs, shapes: Shapes, rows_PP: Numbers, used_PSP: Numbers, serving_P: Numbers, trained: bool
) -> float:
    """Seconds of ``all_to_all``.

    Args:
        rows_PP: rows that each rank sends to each.
        used_PSP: (token, expert) pairs of each rank, per site and destination.
        serving_P: experts of each rank that any token uses, over all sites.
        trained: whether a backward follows.
    """
    row, out = shapes.row_bytes, shapes.output_bytes
    slowest = 0.0
    for own, leaves, arrives, pairs, serving in zip(
        rows_PP.diagonal().tolist(),
        rows_PP.sum(1).tolist(),
        rows_PP.sum(0).tolist(),
        (_per_pair(costs, shapes) @ used_PSP.sum(0)).tolist(),
        serving_P.tolist(),
        strict=True,
    ):
        copied = 3.0 * (leaves + arrives) * (row + out)
        leaves, arrives = leaves - own, arrives - own
        moved = max(leaves * row + arrives * out, arrives * row + leaves * out)
        slowest = max(slowest, _seconds(costs, moved, copied, pairs, serving, trained))
    return slowest + costs.tokens_s + (costs.tokens_back_s if trained else 0.0)


def weights_time(
    costs: Costs, shapes: Shapes, fetched_PSP: Numbers, used_PSP: Numbers, wanted_P: Numbers, trained: bool
) -> float:
    """Seconds of ``gather``.

    Args:
        fetched_PSP: experts that each rank (first axis) fetches, per site, from each (last axis).
        used_PSP: (token, expert) pairs of each rank, per site and owner.
        wanted_P: experts that each rank's tokens use, over all sites.
    """
    nbytes_PP = shapes.expert_bytes @ fetched_PSP
    slowest = 0.0
    for own, arrives, leaves, pairs, wanted in zip(
        nbytes_PP.diagonal().tolist(),
        nbytes_PP.sum(1).tolist(),
        nbytes_PP.sum(0).tolist(),
        (used_PSP.sum(2) @ _per_pair(costs, shapes)).tolist(),
        wanted_P.tolist(),
        strict=True,
    ):
        copied, moved = 3.0 * (arrives + leaves), max(arrives, leaves) - own
        slowest = max(slowest, _seconds(costs, moved, copied, pairs, wanted, trained))
    return slowest + costs.weights_s + (costs.weights_back_s if trained else 0.0)


def _seconds(costs: Costs, moved: float, copied: float, pairs: float, groups: float, trained: bool) -> float:
    """Of one rank. A backward moves as much again, and computes twice as much."""
    transport = moved / costs.bandwidth + copied / costs.copy
    compute = pairs + 2 * groups * costs.group_s
    return 2 * transport + 3 * compute if trained else transport + compute


@lru_cache(maxsize=1024)
def _per_pair(costs: Costs, shapes: Shapes) -> Numbers:
    """``[S]`` seconds of a (token, expert) pair at each site."""
    flops_S = np.array([2 * r * (d + o) for r, d, o in shapes.sites])
    copied_S = np.array([2 * (d + o) * shapes.element for _, d, o in shapes.sites])
    seconds: Numbers = flops_S / costs.flops + copied_S / costs.copy
    return seconds
