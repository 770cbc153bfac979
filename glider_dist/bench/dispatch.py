"""``glider-dist bench dispatch --ranks N``: one exchange, forward and backward, by each strategy, on gloo.

Per cell (tokens per rank, experts, workload) these take turns: the fixed strategies and ``auto``, each twice (the
noise), a plain exchange of one row per (token, expert), and the floor of ``gather``. A round counts with its
slowest rank. One site of width 576, LoRA rank 16, k = 2, fp32, experts trainable. All results are first compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glider_dist.bench.floor import gather_floor
from glider_dist.bench.plain import deepspeed_moe, plain_all_to_all
from glider_dist.bench.timing import interleave, save, table
from glider_dist.errors import GliderError
from glider_dist.lora.bank import SiteBank
from glider_dist.parallel.cost import Costs
from glider_dist.parallel.dispatch import Dispatch
from glider_dist.parallel.exchange import count_traffic
from glider_dist.parallel.local_ranks import LocalRanks
from glider_dist.parallel.mesh import Mesh, init_mesh
from glider_dist.parallel.placement import contiguous
from glider_dist.parallel.probe import measure_costs
from glider_dist.routing.route import Route

WIDTH, RANK, TOP_K = 576, 16, 2
TOKENS, EXPERTS = (1, 32, 512, 4096), (8, 64, 166, 1024)
WORKLOADS = ("uniform", "8 hot", "one per query")
# More of the short ones, which are the noisier.
ROUNDS = {1: 101, 32: 101, 512: 51, 4096: 15}
_state: dict[str, Any] = {}


@dataclass(frozen=True)
class Cell:
    tokens: int
    experts: int
    workload: str


def run(folder: Path, ranks: int, only: str | None = None) -> None:
    """Measure all cells, print the table and a summary, and write ``bench_dispatch.json``.

    Args:
        only: one of the numbers of tokens, the cells of which are measured alone.

    Raises:
        GliderError: there are no such cells, or strategies disagree, which would be a bug.
    """
    chosen = [tokens for tokens in TOKENS if only in (None, str(tokens))]
    if not chosen:
        raise GliderError(f"bench dispatch has cells with tokens={', '.join(map(str, TOKENS))}, not {only}")
    rows = []
    with LocalRanks(ranks, timeout_s=600) as group:
        costs = group.run(_start, ranks)[0]
        for experts in EXPERTS:
            for workload in WORKLOADS:
                for tokens in chosen:
                    rows.append(
                        _row(Cell(tokens, experts, workload), group.run(measure, Cell(tokens, experts, workload)))
                    )
                    print(table(rows).splitlines()[-1] if len(rows) > 1 else table(rows), flush=True)
        moe = [
            _moe_row(tokens, experts, group.run(measure_moe, tokens, experts))
            for tokens, experts in ((512, 8), (4096, 64))
            if experts % ranks == 0  # else DeepSpeed's layer refuses
        ]
    print("\n" + table(moe))
    print("\n" + summary(rows))
    about = {
        "ranks": ranks,
        "backend": "gloo",
        "costs": vars(costs),
        "deepspeed_moe": moe,
    }
    save(folder, "dispatch", rows, about)


def summary(rows: list[dict[str, Any]]) -> str:
    """How often ``auto`` is as fast as the faster fixed strategy, over the cells that repeat within 10 %."""
    steady = [row for row in rows if row["noise"] <= 1.1]
    ratios = sorted(row["auto / best"] for row in steady)
    within = sum(ratio <= 1.1 for ratio in ratios)
    dense = [row for row in rows if row["rows per fetched expert"] >= 4 * RANK]
    lines = [f"{len(steady)} of {len(rows)} cells repeat within 10 %."]
    if ratios:
        lines.append(f"auto is within 1.1 of the faster strategy on {within} of them; at worst {ratios[-1]:.2f}.")
    for tokens in TOKENS:
        here = [row for row in dense if row["tokens"] == tokens and row["plain / auto"] is not None]
        if here:
            ranges = [
                f"{key} is {min(row[key] for row in here):.2f} to {max(row[key] for row in here):.2f}"
                for key in ("plain / auto", "plain / floor")
            ]
            lines.append(f"{tokens} tokens, {4 * RANK} or more rows per fetched expert: {ranges[0]}, {ranges[1]}.")
    return "\n".join(lines)


def _start(ranks: int) -> Costs:
    mesh = init_mesh(ranks)
    assert mesh is not None
    _state["mesh"] = mesh
    _state["costs"] = measure_costs(mesh, torch.device("cpu"), torch.float32)
    costs: Costs = _state["costs"]
    return costs


def route_of(cell: Cell, rank: int) -> Route:
    """Two experts for each token, as the workload says."""
    generator = torch.Generator().manual_seed(1000 * rank + cell.tokens)
    p_TE = torch.ones(cell.tokens, cell.experts)
    if cell.workload == "8 hot":
        # Spread over the owners.
        p_TE = torch.full_like(p_TE, 1e-9)
        p_TE[:, torch.linspace(0, cell.experts - 1, 8).long()] = 1.0
    elif cell.workload == "one per query":
        query = (torch.arange(cell.tokens) // 64 + rank) * 7919
        p_TE = torch.full_like(p_TE, 1e-9)
        for step in range(TOP_K):
            p_TE[torch.arange(cell.tokens), (query + step) % cell.experts] = 1.0
    ids = torch.multinomial(p_TE, TOP_K, generator=generator)
    return Route(ids, torch.rand(ids.shape, generator=generator))


def measure(cell: Cell) -> dict[str, Any]:
    """On one rank: seconds of every variant in each round, bytes sent, and what ``auto`` chose."""
    mesh: Mesh = _state["mesh"]
    placement = contiguous([str(i) for i in range(cell.experts)], mesh.expert_parallel)
    owned = len(placement.owned(mesh.expert_rank))
    generator = torch.Generator().manual_seed(mesh.rank)
    bank = SiteBank(
        (torch.randn(owned, RANK, WIDTH, generator=generator) / WIDTH**0.5).requires_grad_(),
        (torch.randn(owned, RANK, WIDTH, generator=generator) / RANK**0.5).requires_grad_(),
        torch.ones(owned),
        torch.ones(owned, dtype=torch.bool),
    )
    x = torch.randn(cell.tokens, WIDTH, generator=generator).requires_grad_()
    route = route_of(cell, mesh.rank)
    scales = {"site": torch.ones(cell.experts)}
    ways = {
        way: Dispatch(mesh, placement, way, scales, torch.device("cpu"), _state["costs"])
        for way in ("all_to_all", "gather", "auto")
    }

    def step(way: str) -> torch.Tensor:
        if way == "plain":
            out = plain_all_to_all(x, route, bank, cell.experts, mesh.expert_group)
        else:
            (out,) = ways[way](x, ["site"], [route], [bank])
        out.sum().backward()
        return out.detach()

    even = cell.experts % mesh.expert_parallel == 0
    sent = {}
    results = {}
    for way in (*ways, *(["plain"] if even else [])):
        x.grad = bank.A.grad = bank.B.grad = None
        with count_traffic() as traffic:
            out = step(way)
        sent[way] = sum(traffic.sent.values())
        made = (out, x.grad, bank.A.grad, bank.B.grad)
        results[way] = torch.cat([tensor.flatten() for tensor in made if tensor is not None])
    for way, result in results.items():
        error = float((result - results["all_to_all"]).norm() / results["all_to_all"].norm())
        if not error < 1e-4:
            raise GliderError(f"{cell}: {way} differs from all_to_all by {error:.1e}; this is a bug")
    names = ["all_to_all", "gather", "auto", *(["plain"] if even else []), "all_to_all ", "gather ", "auto "]
    variants: dict[str, Callable[[], Any]] = {name: partial(step, name.strip()) for name in names}
    variants["floor"] = gather_floor(x, route, RANK, mesh, placement)
    seconds = interleave(variants, ROUNDS[cell.tokens], lambda: dist.barrier(group=mesh.expert_group))
    chosen = max(ways["auto"].chosen, key=lambda way: ways["auto"].chosen[way])
    experts = route.expert_ids.unique()
    return {"seconds": seconds, "sent": sent, "chosen": chosen, "fetched": len(experts)}


def _row(cell: Cell, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    def time(name: str) -> float:
        return statistics.median(
            max(values) for values in zip(*(one["seconds"][name] for one in ranks), strict=True)
        )

    tokens, weights, auto, floor = time("all_to_all"), time("gather"), time("auto"), time("floor")
    again = [(tokens, time("all_to_all ")), (weights, time("gather ")), (auto, time("auto "))]
    fixed = [min(pair) for pair in again[:2]]
    return {
        "tokens": cell.tokens,
        "experts": cell.experts,
        "workload": cell.workload,
        "rows per fetched expert": cell.tokens * TOP_K / statistics.mean(one["fetched"] for one in ranks),
        "all_to_all ms": 1e3 * tokens,
        "gather ms": 1e3 * weights,
        "auto ms": 1e3 * auto,
        "auto chose": ranks[0]["chosen"],
        "auto / best": min(again[2]) / min(fixed),
        "noise": max(max(pair) / min(pair) for pair in again),
        "plain / auto": time("plain") / auto if "plain" in ranks[0]["seconds"] else None,
        "gather / floor": weights / floor,
        "plain / floor": time("plain") / floor if "plain" in ranks[0]["seconds"] else None,
        "all_to_all KiB": max(one["sent"]["all_to_all"] for one in ranks) / 1024,
        "gather KiB": max(one["sent"]["gather"] for one in ranks) / 1024,
    }


def measure_moe(tokens: int, experts: int) -> dict[str, list[float]]:
    """DeepSpeed's MoE layer, its gate included, against ours with a gate of the same size: seconds per round."""
    mesh: Mesh = _state["mesh"]
    layer = deepspeed_moe(WIDTH, RANK, experts, mesh.expert_parallel, TOP_K)
    x = torch.randn(1, tokens, WIDTH, requires_grad=True)
    placement = contiguous([str(i) for i in range(experts)], mesh.expert_parallel)
    owned = len(placement.owned(mesh.expert_rank))
    a, b = torch.randn(owned, RANK, WIDTH) / WIDTH**0.5, torch.randn(owned, RANK, WIDTH) / RANK**0.5
    eligible = torch.ones(owned, dtype=torch.bool)
    bank = SiteBank(a.requires_grad_(), b.requires_grad_(), torch.ones(owned), eligible)
    gate = torch.randn(experts, WIDTH, requires_grad=True)
    dispatch = Dispatch(
        mesh, placement, "auto", {"site": torch.ones(experts)}, torch.device("cpu"), _state["costs"]
    )

    def ours() -> None:
        weights, ids = (x[0] @ gate.t()).softmax(-1).topk(TOP_K)
        dispatch(x[0], ["site"], [Route(ids, weights / weights.sum(-1, keepdim=True))], [bank])[0].sum().backward()

    def theirs() -> None:
        layer(x)[0].sum().backward()

    return interleave(
        {"ours": ours, "theirs": theirs}, ROUNDS[tokens], lambda: dist.barrier(group=mesh.expert_group)
    )


def _moe_row(tokens: int, experts: int, ranks: list[dict[str, list[float]]]) -> dict[str, Any]:
    both = {
        name: statistics.median(max(values) for values in zip(*(one[name] for one in ranks), strict=True))
        for name in ("ours", "theirs")
    }
    return {
        "tokens": tokens,
        "experts": experts,
        "DeepSpeed MoE ms": 1e3 * both["theirs"],
        "ours ms": 1e3 * both["ours"],
        "DeepSpeed / ours": both["theirs"] / both["ours"],
    }
