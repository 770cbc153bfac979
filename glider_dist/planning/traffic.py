"""Estimated traffic and time, from the figures under ``plan``; nothing here is measured.

Compute: floating-point operations of the traced step over ``plan.tflops`` times ``plan.utilisation``, or its
kernels times ``plan.launch_us``, whichever is more. Bytes between ranks: those of the strategies
(:mod:`glider_dist.parallel.tokens` and ``weights``), by the cost model that ``auto`` decides with; for ZeRO 3
those of Rajbhandari et al., arXiv 1910.02054, section 7.2.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from glider_dist.lora.bank import padded_rank
from glider_dist.parallel.cost import Costs, Shapes, tokens_time, weights_time

if TYPE_CHECKING:
    from glider_dist.planning.depth import Measured
    from glider_dist.planning.target import Target

WAYS = ("all_to_all", "gather")
# With these the cost model's seconds are the bytes that the busiest rank moves.
_BYTES = Costs(0, 0, 0, 0, bandwidth=1, flops=inf, group_s=0, copy=inf)
_LATENCY = 3e-5  # of a collective over NCCL, and of a host sync beside it


def compute_seconds(target: Target, work: Measured) -> float:
    """Of one rank."""
    plan = target.cfg.plan
    return max(work.flops / (plan.tflops * 1e12 * plan.utilisation), work.kernels * plan.launch_us * 1e-6)


def bandwidth(target: Target, ranks: int) -> float:
    """Bytes per second one way between a rank and its group of so many consecutive ranks."""
    plan = target.cfg.plan
    inside = ranks <= target.node and target.node % ranks == 0
    return (plan.node_gb_s if inside else plan.network_gb_s) * 1e9


def sharded_traffic(target: Target, backward: bool) -> tuple[float, float]:
    """Bytes that a rank receives of a base under ZeRO 3 in one forward (and backward), and seconds.

    Every parameter is gathered once forward and once backward: (W - 1) / W of the base each. It is frozen, so that
    no gradient is reduced. Activations that are recomputed are so beside their block's backward, for which its
    parameters are there.
    """
    if not target.sharded:
        return 0.0, 0.0
    moved = target.frozen.nbytes * (target.world - 1) / target.world * (2 if backward else 1)
    return moved, moved / bandwidth(target, target.world)


@dataclass(frozen=True)
class Exchange:
    """What the sites that read one input exchange in a forward, by strategy; tokens spread evenly over experts.

    Attributes:
        nbytes: to or from other ranks, whichever is more.
        seconds: of the exchange and of what is computed in it.
        buffers: bytes of messages, sent and received.
    """

    nbytes: dict[str, float]
    seconds: dict[str, float]
    buffers: dict[str, int]


def exchange(
    target: Target, shapes: tuple[tuple[int, int], ...], tokens: int, places: int, trained: bool
) -> Exchange:
    """Of sites of these shapes that read one input.

    Args:
        shapes: ``(d_out, d_in)`` of each.
        tokens: of a rank.
        places: experts of a token.
        trained: whether a backward follows.
    """
    plan, ranks, rank = target.cfg.plan, target.expert_parallel, padded_rank(target.experts.rank)
    total = len(target.experts.names)
    places = min(places, total)
    sites = tuple((rank, d_in, d_out) for d_out, d_in in shapes)
    sizes = Shapes(sites, places * len(sites), target.base.dtype.itemsize, 4)
    owned = np.array([target.placement.owner.count(place) for place in range(ranks)], dtype=np.float64)
    # Of a token's experts, none lives on a rank with the chance of drawing all from the others.
    missed = np.prod([np.clip(total - owned - i, 0, None) / (total - i) for i in range(places)], axis=0)
    rows_PP = np.tile(tokens * (1 - missed), (ranks, 1))
    used_PSP = np.tile(tokens * places * owned / total, (ranks, len(sites), 1))
    wanted = distinct(total, places, tokens)
    fetched_PSP = np.tile(owned * wanted / total, (ranks, len(sites), 1))
    wanted_P = np.full(ranks, wanted * len(sites))
    # An expert serves if a token of any rank draws it.
    serving_P = owned * distinct(total, places, tokens * ranks) / total * len(sites)
    costs = Costs(
        tokens_s=_LATENCY,
        tokens_back_s=_LATENCY,
        weights_s=_LATENCY,
        weights_back_s=_LATENCY,
        bandwidth=bandwidth(target, ranks),
        flops=plan.tflops * 1e12 * plan.utilisation,
        group_s=0.0,
        copy=plan.memory_gb_s * 1e9,
    )

    def by_tokens(costs: Costs) -> float:
        return tokens_time(costs, sizes, rows_PP, used_PSP, serving_P, trained)

    def by_weights(costs: Costs) -> float:
        return weights_time(costs, sizes, fetched_PSP, used_PSP, wanted_P, trained)

    received = 2 * rows_PP[0].sum() * (sizes.row_bytes + sizes.output_bytes)
    copies = 2 * sum(r * (d + o) for r, d, o in sites) * wanted * sizes.element
    return Exchange(
        {"all_to_all": by_tokens(_BYTES), "gather": by_weights(_BYTES)},
        {"all_to_all": by_tokens(costs), "gather": by_weights(costs)},
        {"all_to_all": round(received), "gather": round(copies)},
    )


def distinct(total: int, drawn: int, times: int) -> float:
    """How many of ``total`` are drawn at least once, on average, in so many draws of ``drawn`` without order."""
    return float(total * (1 - (1 - min(drawn, total) / total) ** times))
