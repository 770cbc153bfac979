"""Work that the dispatch tests run on every rank: exchanges, compared with the dense formula."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from glider_dist.lora.bank import SiteBank
from glider_dist.parallel.cost import Costs
from glider_dist.parallel.dispatch import Dispatch
from glider_dist.parallel.exchange import Traffic, count_traffic
from glider_dist.parallel.mesh import Mesh, init_mesh
from glider_dist.parallel.placement import Placement, balanced, contiguous
from glider_dist.routing.route import Route

_meshes: dict[int, Mesh | None] = {}


def mesh_of(expert_parallel: int) -> Mesh:
    """One mesh per size in each process: groups are never given back."""
    if expert_parallel not in _meshes:
        _meshes[expert_parallel] = init_mesh(expert_parallel)
    mesh = _meshes[expert_parallel]
    assert mesh is not None
    return mesh


def sum_over_replicas(mesh: Mesh, tensor: torch.Tensor) -> torch.Tensor:
    """Sum in place over the ranks that hold the same experts, and return it (expert gradients)."""
    if mesh.replica_group is not None:
        dist.all_reduce(tensor, group=mesh.replica_group)
    return tensor


@dataclass(frozen=True)
class Case:
    """Sizes and workload of one exchange; every rank draws all ranks' inputs from the seed.

    ``frozen`` experts get no gradient; ``input_grad`` False is the layer above a frozen embedding.
    """

    workload: str = "uniform"
    experts: int = 7
    places: int = 2
    tokens: int = 13
    ragged: bool = False
    shapes: tuple[tuple[int, int, int], ...] = ((8, 24, 16), (16, 24, 40))
    dtype: torch.dtype = torch.float64
    seed: int = 0
    placement: str = "contiguous"
    frozen: bool = False
    input_grad: bool = True

    def tokens_of(self, rank: int) -> int:
        if self.workload == "empty" or (self.workload == "a rank without tokens" and rank == 0):
            return 0
        return 1 if self.workload == "a single token" else self.tokens + 3 * rank

    def place(self, ranks: int) -> Placement:
        names = [f"expert_{index}" for index in range(self.experts)]
        if self.placement == "contiguous":
            return contiguous(names, ranks)
        generator = torch.Generator().manual_seed(self.seed)
        load = torch.rand(self.experts, generator=generator).tolist()
        return balanced(names, ranks, dict(zip(names, load, strict=True)))

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def sites(self) -> list[str]:
        return [f"site{index}" for index in range(len(self.shapes))]


def draw_ids(case: Case, tokens: int, placement: Placement, rank: int, generator: torch.Generator) -> torch.Tensor:
    """``[T, K]`` distinct experts for each token, -1 where unused."""
    p_TE = torch.ones(tokens, case.experts, dtype=torch.float64)
    if case.workload == "zipf":
        p_TE = p_TE / torch.arange(1, case.experts + 1) ** 1.5
    elif case.workload == "one hot expert":
        p_TE[:, case.experts // 2] = 1e6
    elif case.workload == "all tokens to one rank":
        chosen = placement.owned(max(range(placement.ranks), key=lambda r: len(placement.owned(r))))
        p_TE[:] = 1e-9
        p_TE[:, chosen] = 1.0
    elif case.workload == "a rank without load":
        p_TE[:, placement.owned(placement.ranks - 1)] = 1e-30
    elif case.workload == "rotating hotspot":
        p_TE[torch.arange(tokens), (torch.arange(tokens) + rank) % case.experts] = 1e6
    elif case.workload == "one expert per query":
        p_TE[:, (rank + torch.arange(tokens) // 5) % case.experts] = 1e4
    elif case.workload == "two experts of one rank each":
        p_TE[:] = 1e-30
        p_TE[:, placement.owned(0)[2 * rank : 2 * rank + 2]] = 1.0
    places = min(case.places, case.experts)
    if not tokens:
        return torch.zeros(0, places, dtype=torch.int64)
    ids_TK = torch.multinomial(p_TE, places, generator=generator)
    if case.ragged:
        unused = torch.rand(ids_TK.shape, generator=generator) < 0.4
        unused[: tokens // 3, 1:] = True
        ids_TK = ids_TK.masked_fill(unused, -1)
    return ids_TK


@dataclass(frozen=True)
class Inputs:
    """One rank's tokens, where they go at each site, and the gradient of each site's output."""

    x: torch.Tensor
    routes: list[Route]
    cotangents: list[torch.Tensor]

    def leaves(self, case: Case) -> Inputs:
        fresh = [Route(r.expert_ids, r.weights.clone().requires_grad_(), r.ragged) for r in self.routes]
        return Inputs(self.x.clone().requires_grad_(case.input_grad), fresh, self.cotangents)


def draw_experts(case: Case) -> list[SiteBank]:
    """All experts of each site."""
    generator = torch.Generator().manual_seed(1000 + case.seed)
    whole = []
    for r, d, o in case.shapes:
        a = torch.randn(case.experts, r, d, dtype=case.dtype, generator=generator) / d**0.5
        b = torch.randn(case.experts, r, o, dtype=case.dtype, generator=generator) / r**0.5
        scale = torch.rand(case.experts, generator=generator) + 0.5
        whole.append(SiteBank(a, b, scale, torch.ones(case.experts, dtype=torch.bool)))
    return whole


def draw_inputs(case: Case, world: int, placement: Placement) -> list[Inputs]:
    generator = torch.Generator().manual_seed(case.seed)
    drawn = []
    for rank in range(world):
        tokens = case.tokens_of(rank)
        x = torch.randn(tokens, case.shapes[0][1], dtype=case.dtype, generator=generator)
        routes, cots = [], []
        for _, _, o in case.shapes:
            ids = draw_ids(case, tokens, placement, rank, generator)
            weights = torch.rand(ids.shape, generator=generator).to(case.wide).masked_fill(ids < 0, 0.0)
            routes.append(Route(ids, weights, case.ragged))
            cots.append(torch.randn(tokens, o, generator=generator).to(case.wide))
        drawn.append(Inputs(x, routes, cots))
    return drawn


def joined(inputs: Sequence[Inputs]) -> Inputs:
    """All ranks' inputs as those of one."""
    routes = []
    for each in zip(*(one.routes for one in inputs), strict=True):
        ids, weights = (torch.cat([getattr(route, name) for route in each]) for name in ("expert_ids", "weights"))
        routes.append(Route(ids, weights, each[0].ragged))
    cots = [torch.cat(each) for each in zip(*(one.cotangents for one in inputs), strict=True)]
    return Inputs(torch.cat([one.x for one in inputs]), routes, cots)


def dense(x_Td: torch.Tensor, route: Route, bank: SiteBank) -> torch.Tensor:
    """``Σ_k w_k s_k B_k A_k x`` place by place, at least in fp32."""
    wide = route.weights.dtype
    out = x_Td.new_zeros(x_Td.shape[0], bank.B.shape[2], dtype=wide)
    for place in range(route.expert_ids.shape[1]):
        used = route.expert_ids[:, place] >= 0
        ids = route.expert_ids[:, place].clamp_min(0)
        h_Tr = torch.einsum("td,trd->tr", x_Td.to(wide), bank.A[ids].to(wide))
        y_To = torch.einsum("tr,tro->to", h_Tr, bank.B[ids].to(wide))
        factor = route.weights[:, place] * bank.scale.to(wide)[ids] * used
        out = out + y_To * factor[:, None]
    return out


def own_part(case: Case, whole: Sequence[SiteBank], owned: Sequence[int]) -> list[SiteBank]:
    index = torch.tensor(owned, dtype=torch.int64)
    banks = []
    for bank in whole:
        a, b = bank.A.detach()[index], bank.B.detach()[index]
        banks.append(SiteBank(a, b, bank.scale[index], bank.eligible[index]))
        for tensor in (a, b):
            tensor.requires_grad_(not case.frozen)
    return banks


def backward(outs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]) -> None:
    loss = sum((out * cot).sum() for out, cot in zip(outs, cotangents, strict=True))
    assert isinstance(loss, torch.Tensor)
    loss.backward()


@dataclass(frozen=True)
class Outcome:
    """Of one exchange on one rank.

    Attributes:
        errors: largest relative error of ``outputs``, ``x``, ``weights``, ``A`` and ``B``.
        forward, backward: what it cost.
        strategy: the one that was used.
        cached: bytes in the cache afterwards.
    """

    errors: dict[str, float]
    forward: Traffic
    backward: Traffic
    strategy: str
    cached: int

    @property
    def error(self) -> float:
        return max(self.errors.values())


def run_case(case: Case, strategy: str, expert_parallel: int, **how: Any) -> list[Outcome]:
    """One exchange; for frozen experts two, the second partly from the cache."""
    later = [replace(case, seed=case.seed + 1)] if case.frozen else []
    return run_sequence([case, *later], strategy, expert_parallel, **how)


def run_sequence(
    cases: Sequence[Case],
    strategy: str,
    expert_parallel: int,
    cache_bytes: int = 1 << 30,
    watch: contextlib.AbstractContextManager[Any] | None = None,
    keep: list[torch.Tensor] | None = None,
    costs: Costs | None = None,
) -> list[Outcome]:
    """Several exchanges over the experts of the first case, with one Dispatch.

    Args:
        watch: a context for the exchange and its backward alone.
        costs: constants for ``auto``.
        keep: is given this rank's outputs and gradients.
    """
    mesh = mesh_of(expert_parallel)
    first = cases[0]
    placement = first.place(expert_parallel)
    whole = draw_experts(first)
    owned = placement.owned(mesh.expert_rank)
    scales = {site: bank.scale for site, bank in zip(first.sites, whole, strict=True)}
    dispatch = Dispatch(mesh, placement, strategy, scales, torch.device("cpu"), costs, cache_bytes=cache_bytes)
    found = []
    for case in cases:
        inputs = draw_inputs(case, mesh.expert_parallel * mesh.data_parallel, placement)
        for bank in whole:
            for tensor in (bank.A, bank.B):
                tensor.requires_grad_(not first.frozen)
                tensor.grad = None
        # The formula, on all ranks' tokens at once.
        formula = joined(inputs).leaves(case)
        wanted = [dense(formula.x, route, bank) for route, bank in zip(formula.routes, whole, strict=True)]
        backward(wanted, formula.cotangents)
        counts = [each.x.shape[0] for each in inputs]
        start = sum(counts[: mesh.rank])
        mine = slice(start, start + counts[mesh.rank])
        banks = own_part(first, whole, owned)
        own = inputs[mesh.rank].leaves(case)
        before = dict(dispatch.chosen)
        with watch or contextlib.nullcontext():
            with count_traffic() as forward:
                outs = dispatch(own.x, case.sites, own.routes, banks)
            with count_traffic() as returned:
                backward(outs, own.cotangents)
        pairs: dict[str, list[tuple[Any, Any]]] = {
            "outputs": [(ours, theirs[mine]) for ours, theirs in zip(outs, wanted, strict=True)],
            "weights": [
                (ours.weights.grad.masked_fill(ours.expert_ids < 0, 0), theirs.weights.grad[mine])
                for ours, theirs in zip(own.routes, formula.routes, strict=True)
            ],
        }
        if case.input_grad:
            pairs["x"] = [(own.x.grad, formula.x.grad[mine])]
        if not first.frozen:
            pairs["A"] = [
                (sum_over_replicas(mesh, part.A.grad), bank.A.grad[owned])
                for part, bank in zip(banks, whole, strict=True)
            ]
            pairs["B"] = [
                (sum_over_replicas(mesh, part.B.grad), bank.B.grad[owned])
                for part, bank in zip(banks, whole, strict=True)
            ]
        if keep is not None:
            keep += [pair[0].detach().clone() for each in pairs.values() for pair in each]
        errors = {name: max(relative_error(*pair) for pair in each) for name, each in pairs.items()}
        (used,) = [name for name, count in dispatch.chosen.items() if count > before[name]]
        found.append(Outcome(errors, forward, returned, used, dispatch.cache.nbytes))
    return found


def relative_error(ours: torch.Tensor, formula: torch.Tensor) -> float:
    assert ours.shape == formula.shape
    if not formula.numel():
        return 0.0
    ours, formula = ours.detach().double(), formula.detach().double()
    return float((ours - formula).abs().max() / formula.abs().max().clamp_min(1e-3))


def run_cases(
    cases: Sequence[tuple[Case, str]], expert_parallel: int, costs: Costs | None = None
) -> list[list[Outcome]]:
    return [run_case(case, strategy, expert_parallel, costs=costs) for case, strategy in cases]
