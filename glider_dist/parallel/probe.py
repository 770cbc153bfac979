"""Measure the constants by which ``auto`` decides, with a few exchanges and products (about a second)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist

from glider_dist.lora.bank import SiteBank
from glider_dist.lora.grouped import grouped_product
from glider_dist.parallel.cost import Costs
from glider_dist.parallel.dispatch import Dispatch
from glider_dist.parallel.exchange import gather_objects
from glider_dist.parallel.mesh import Mesh
from glider_dist.parallel.placement import contiguous
from glider_dist.routing.route import Route

_WARM_UP, _REPEATS = 3, 15
_BLOCKS, _EACH = 24, 4  # of exchanges, each way


def measure_costs(mesh: Mesh, device: torch.device, dtype: torch.dtype) -> Costs:
    """The constants of this machine; the same on all ranks of the expert-parallel group, which all call it.

    Args:
        dtype: in which the experts compute.
    """
    if device.type == "cpu":
        # Half precision is computed in padded groups there, which cost about what these do in fp32.
        dtype = torch.float32
    found = {**_fixed(mesh, device), **_rates(mesh, device, dtype)}
    rows = [found]
    if mesh.expert_group is not None:
        rows = gather_objects("costs", found, mesh.expert_group)
    # All must decide alike, and the slowest rank sets the pace.
    worst: dict[str, Callable[[Sequence[float]], float]] = {"bandwidth": min, "flops": min, "copy": min}
    return Costs(**{name: worst.get(name, max)([row[name] for row in rows]) for name in found})


def _fixed(mesh: Mesh, device: torch.device) -> dict[str, float]:
    """An exchange of one token between small experts, each way."""
    if mesh.expert_group is None:
        return {}
    placement = contiguous([str(place) for place in range(mesh.expert_parallel)], mesh.expert_parallel)
    ones = torch.ones(mesh.expert_parallel, device=device)
    a, b = (torch.ones(1, 8, 64, device=device, requires_grad=True) for _ in range(2))
    bank = SiteBank(a, b, ones[:1], ones[:1].bool())
    x = torch.ones(1, 64, device=device, requires_grad=True)
    away = (mesh.expert_rank + 1) % mesh.expert_parallel
    route = Route(torch.tensor([[mesh.expert_rank, away]], device=device), torch.ones(1, 2, device=device))
    # With the control exchange and the decision of ``auto``, which it pays for either way.
    ways = {"tokens": Costs(weights_s=math.inf), "weights": Costs(tokens_s=math.inf)}
    dispatches = {name: Dispatch(mesh, placement, "auto", {"": ones}, device, way) for name, way in ways.items()}
    forward: dict[str, list[float]] = {name: [] for name in ways}
    both: dict[str, list[float]] = {name: [] for name in ways}
    # In turn, so that a slow moment hits both alike, but several at a time, as in a model.
    for _ in range(_BLOCKS):
        for name, dispatch in dispatches.items():
            dist.barrier(group=mesh.expert_group)
            seconds, started = 0.0, _now(device)
            for _ in range(_EACH):
                before = _now(device)
                (out,) = dispatch(x, [""], [route], [bank])
                seconds += _now(device) - before
                out.sum().backward()
            forward[name].append(seconds / _EACH)
            both[name].append((_now(device) - started) / _EACH)
    backward = {name: [b - f for f, b in zip(forward[name], both[name], strict=True)] for name in ways}
    return {**_compared("_s", forward), **_compared("_back_s", backward)}


def _compared(suffix: str, blocks: dict[str, list[float]]) -> dict[str, float]:
    """Seconds of both ways, by their difference within a turn: single times vary by more than they differ."""
    weights, tokens = (blocks[name][_WARM_UP:] for name in ("weights", "tokens"))
    usual = statistics.median(weights)
    more = statistics.median(t - w for t, w in zip(tokens, weights, strict=True))
    return {f"tokens{suffix}": max(usual + more, 0.0), f"weights{suffix}": usual}


def _rates(mesh: Mesh, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    found = {}
    group, ranks = mesh.expert_group, mesh.expert_parallel
    if group is not None:
        small = torch.zeros(ranks * 16, device=device)
        large = torch.zeros(ranks << 19, device=device)  # 2 MiB to each rank
        least = _seconds(lambda: dist.all_to_all_single(torch.empty_like(small), small, group=group), device)
        most = _seconds(lambda: dist.all_to_all_single(torch.empty_like(large), large, group=group), device, 5)
        found["bandwidth"] = large.nbytes / ranks * (ranks - 1) / max(most - least, 1e-6)
    width, rank, groups = 1024, 16, 64
    x = torch.randn(groups * 8, width, device=device, dtype=dtype)
    w = torch.randn(groups, width, rank, device=device, dtype=dtype)
    all_first = torch.full((groups,), groups * 8, dtype=torch.int32, device=device)
    ends = torch.arange(1, groups + 1, dtype=torch.int32, device=device)
    one = _seconds(lambda: grouped_product(x, w, all_first), device)
    found["flops"] = 2 * x.shape[0] * width * rank / max(one, 1e-7)
    many = _seconds(lambda: grouped_product(x[:groups], w, ends), device)
    less = _seconds(lambda: grouped_product(x[:groups], w[:1], ends[-1:]), device)
    found["group_s"] = max((many - less) / groups, 1e-8)
    # As much as an exchange copies. For 16 MB the allocator went to the system each time or never, and the rate of
    # one run was six times that of another.
    index = torch.randint(0, x.shape[0], (512,), device=device)
    copying = _seconds(lambda: x.index_select(0, index), device)
    found["copy"] = 2 * index.shape[0] * width * x.element_size() / max(copying, 1e-7)
    return {**{name: value for name, value in asdict(Costs()).items() if name == "bandwidth"}, **found}


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    times = []
    for _ in range(repeats + _WARM_UP):
        started = _now(device)
        work()
        times.append(_now(device) - started)
    return statistics.median(times[_WARM_UP:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
