"""What an exchange costs either way: the model by which ``auto`` decides. ``probe`` measures its constants.

After the count exchange every rank has the control numbers of all ranks, so all compute the same two times and
decide alike. The time of an exchange is that of its slowest rank:

    time = fixed + bytes / bandwidth + groups · group_s + rows · row_flops / flops + copied / copy

Bytes are the floor, but measured time decides: on gloo the two strategies cross later than their bytes do.
"""

from __future__ import annotations

from dataclasses import dataclass
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


def tokens_time(
    costs: Costs, shapes: Shapes, rows_PP: Numbers, used_PSP: Numbers, serving_PS: Numbers, trained: bool
) -> float:
    """Seconds of ``all_to_all``.

    Args:
        rows_PP: rows that each rank sends to each.
        used_PSP: (token, expert) pairs of each rank, per site and destination.
        serving_PS: experts of each rank that any token uses, per site.
        trained: whether a backward follows.
    """
    away = rows_PP * (1 - np.eye(len(rows_PP)))
    leaves, arrives = away.sum(1), away.sum(0)
    sent = leaves * shapes.row_bytes + arrives * shapes.output_bytes
    received = arrives * shapes.row_bytes + leaves * shapes.output_bytes
    here_P, out_P = rows_PP.sum(0), rows_PP.sum(1)
    copied = (here_P + out_P) * 3.0 * (shapes.row_bytes + shapes.output_bytes)
    compute = _compute(costs, shapes, used_PSP.sum(0).T, serving_PS)
    one = np.maximum(sent, received) / costs.bandwidth + copied / costs.copy + compute
    if trained:
        one = 2 * one + compute
    return float(one.max() + costs.tokens_s + (costs.tokens_back_s if trained else 0.0))


def weights_time(
    costs: Costs, shapes: Shapes, fetched_PPS: Numbers, used_PS: Numbers, wanted_PS: Numbers, trained: bool
) -> float:
    """Seconds of ``gather``.

    Args:
        fetched_PPS: experts that each rank (first axis) fetches from each (second axis), per site.
        used_PS: (token, expert) pairs of each rank per site.
        wanted_PS: experts that each rank's tokens use per site.
    """
    size_S = np.array([r * (d + o) * shapes.element for r, d, o in shapes.sites])
    nbytes_PP = fetched_PPS @ size_S
    away = nbytes_PP * (1 - np.eye(len(nbytes_PP)))
    moved = np.maximum(away.sum(0), away.sum(1)) / costs.bandwidth
    copied = 3.0 * (nbytes_PP.sum(0) + nbytes_PP.sum(1))
    compute = _compute(costs, shapes, used_PS, wanted_PS)
    one = moved + copied / costs.copy + compute
    if trained:
        one = 2 * one + compute
    return float(one.max() + costs.weights_s + (costs.weights_back_s if trained else 0.0))


def _compute(costs: Costs, shapes: Shapes, rows_PS: Numbers, groups_PS: Numbers) -> Numbers:
    flops_S = np.array([2 * r * (d + o) for r, d, o in shapes.sites])
    copied_S = np.array([2 * (d + o) * shapes.element for _, d, o in shapes.sites])
    per_row = flops_S / costs.flops + copied_S / costs.copy
    seconds: Numbers = rows_PS @ per_row + groups_PS.sum(1) * 2 * costs.group_s
    return seconds
