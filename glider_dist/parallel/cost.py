"""What an exchange costs either way: the model by which ``auto`` decides, and the measurement of its constants.

After the count exchange every rank has the control numbers of all ranks, so all compute the same two times and
decide alike. The time of an exchange is that of its slowest rank:

    time = collectives · latency + bytes / bandwidth + groups · group_s + rows · row_flops / flops + copied / copy

Bytes are the floor, but measured time decides: on gloo the two strategies cross later than their bytes do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from glider_dist.lora.grouped import grouped_product
from glider_dist.parallel.exchange import gather_objects
from glider_dist.parallel.mesh import Mesh

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Costs:
    """Constants of this machine. The defaults are rough figures of gloo over loopback.

    Attributes:
        latency_s: one collective of a few bytes.
        bandwidth: bytes per second that a rank sends in an all-to-all.
        flops: floating-point operations per second of a product with LoRA's shapes.
        group_s: one more group of rows in a grouped product, whatever its size.
        copy: bytes per second of gathering and scattering rows.
    """

    latency_s: float = 2e-4
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
    costs: Costs, shapes: Shapes, rows_PP: Numbers, used_PSP: Numbers, owned_P: Numbers, trained: bool
) -> float:
    """Seconds of ``all_to_all``.

    Args:
        rows_PP: rows that each rank sends to each.
        used_PSP: (token, expert) pairs of each rank, per site and destination.
        owned_P: experts that each rank owns.
        trained: whether a backward follows.
    """
    away = rows_PP * (1 - np.eye(len(rows_PP)))
    leaves, arrives = away.sum(1), away.sum(0)
    sent = leaves * shapes.row_bytes + arrives * shapes.output_bytes
    received = arrives * shapes.row_bytes + leaves * shapes.output_bytes
    here_P, out_P = rows_PP.sum(0), rows_PP.sum(1)
    copied = (here_P + out_P) * 3.0 * (shapes.row_bytes + shapes.output_bytes)
    compute = _compute(costs, shapes, used_PSP.sum(0).T, np.minimum(owned_P[:, None], used_PSP.sum(0).T))
    one = np.maximum(sent, received) / costs.bandwidth + copied / costs.copy + compute
    if trained:
        one = 2 * one + compute
    return float(one.max() + (4 if trained else 2) * costs.latency_s)


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
    return float(one.max() + (2 if trained else 1) * costs.latency_s)


def _compute(costs: Costs, shapes: Shapes, rows_PS: Numbers, groups_PS: Numbers) -> Numbers:
    flops_S = np.array([2 * r * (d + o) for r, d, o in shapes.sites])
    copied_S = np.array([2 * (d + o) * shapes.element for _, d, o in shapes.sites])
    per_row = flops_S / costs.flops + copied_S / costs.copy
    seconds: Numbers = rows_PS @ per_row + groups_PS.sum(1) * 2 * costs.group_s
    return seconds


def measure_costs(mesh: Mesh, device: torch.device) -> Costs:
    """Measure the constants with a few exchanges and products (about a second); the same result on all ranks."""
    group, ranks = mesh.expert_group, mesh.expert_parallel
    found = asdict(Costs())
    if group is not None:
        small = torch.zeros(ranks * 16, device=device)
        large = torch.zeros(ranks << 19, device=device)  # 2 MiB to each rank
        found["latency_s"] = _seconds(
            lambda: dist.all_to_all_single(torch.empty_like(small), small, group=group), device
        )
        seconds = _seconds(lambda: dist.all_to_all_single(torch.empty_like(large), large, group=group), device, 5)
        found["bandwidth"] = large.nbytes / ranks * (ranks - 1) / max(seconds - found["latency_s"], 1e-6)
    width, rank, groups = 1024, 16, 64
    x = torch.randn(groups * 8, width, device=device)
    w = torch.randn(groups, width, rank, device=device)
    few = torch.full((groups,), groups * 8, dtype=torch.int32, device=device)
    ends = torch.arange(1, groups + 1, dtype=torch.int32, device=device)
    one = _seconds(lambda: grouped_product(x, w, few), device)
    found["flops"] = 2 * x.shape[0] * width * rank / max(one, 1e-7)
    many = _seconds(lambda: grouped_product(x[:groups], w, ends), device)
    less = _seconds(lambda: grouped_product(x[:groups], w[:1], ends[-1:]), device)
    found["group_s"] = max((many - less) / groups, 1e-8)
    index = torch.randint(0, x.shape[0], (4096,), device=device)
    found["copy"] = (
        2 * index.shape[0] * width * 4 / max(_seconds(lambda: x.index_select(0, index), device, 5), 1e-7)
    )
    return Costs(**_slowest(found, mesh))


def _slowest(found: dict[str, float], mesh: Mesh) -> dict[str, float]:
    """The worst of each constant over the group: all ranks must decide alike."""
    rows = [found]
    if mesh.expert_group is not None:
        rows = gather_objects("costs", found, mesh.expert_group)
    worst: dict[str, Callable[[Sequence[float]], float]] = {"latency_s": max, "group_s": max}
    return {name: worst.get(name, min)([row[name] for row in rows]) for name in found}


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 15) -> float:
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]
