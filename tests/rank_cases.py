"""Work that the dispatch tests run on every rank: one exchange, compared with the dense formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glider_dist.lora.bank import SiteBank
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


@dataclass(frozen=True)
class Case:
    """Sizes and workload of one exchange; every rank draws all ranks' inputs from the seed."""

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
    elif case.workload == "rotating hotspot":
        p_TE[torch.arange(tokens), (torch.arange(tokens) + rank) % case.experts] = 1e6
    elif case.workload == "one expert per query":
        p_TE[:, (rank + torch.arange(tokens) // 5) % case.experts] = 1e4
    places = min(case.places, case.experts)
    if not tokens:
        return torch.zeros(0, places, dtype=torch.int64)
    ids_TK = torch.multinomial(p_TE, places, generator=generator)
    if case.ragged:
        unused = torch.rand(ids_TK.shape, generator=generator) < 0.4
        unused[: tokens // 3, 1:] = True
        ids_TK = ids_TK.masked_fill(unused, -1)
    return ids_TK


def dense(x_Td: torch.Tensor, route: Route, bank: SiteBank) -> torch.Tensor:
    """``Σ_k w_k s_k B_k A_k x`` token by token, place by place."""
    out = x_Td.new_zeros(x_Td.shape[0], bank.B.shape[2])
    for place in range(route.expert_ids.shape[1]):
        used = route.expert_ids[:, place] >= 0
        ids = route.expert_ids[:, place].clamp_min(0)
        h_Tr = torch.einsum("td,trd->tr", x_Td, bank.A[ids].to(x_Td.dtype))
        y_To = torch.einsum("tr,tro->to", h_Tr, bank.B[ids].to(x_Td.dtype))
        factor = route.weights[:, place] * bank.scale.to(x_Td.dtype)[ids] * used
        out = out + y_To * factor[:, None]
    return out


def run_case(case: Case, strategy: str, expert_parallel: int) -> tuple[float, Traffic, int]:
    """Largest relative error of outputs and gradients on this rank, and what the exchange cost."""
    mesh = mesh_of(expert_parallel)
    placement = case.place(expert_parallel)
    generator = torch.Generator().manual_seed(case.seed)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=case.dtype, generator=generator)

    whole = []
    for r, d, o in case.shapes:
        scale = torch.rand(case.experts, generator=generator) + 0.5
        eligible = torch.ones(case.experts, dtype=torch.bool)
        a, b = leaf(case.experts, r, d) / d**0.5, leaf(case.experts, r, o) / r**0.5
        whole.append(SiteBank(a, b, scale, eligible))
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    inputs = []
    for rank in range(mesh.expert_parallel * mesh.data_parallel):
        tokens = case.tokens_of(rank)
        x = leaf(tokens, case.shapes[0][1])
        routes, cots = [], []
        for _, _, o in case.shapes:
            ids = draw_ids(case, tokens, placement, rank, generator)
            weights = torch.rand(ids.shape, generator=generator).to(wide).masked_fill(ids < 0, 0.0)
            routes.append(Route(ids, weights, case.ragged))
            cots.append(torch.randn(tokens, o, generator=generator).to(wide))
        inputs.append((x, routes, cots))

    def leaves(x: torch.Tensor, routes: list[Route]) -> tuple[torch.Tensor, list[Route]]:
        fresh = [Route(r.expert_ids, r.weights.clone().requires_grad_(), r.ragged) for r in routes]
        return x.clone().requires_grad_(), fresh

    # The formula, on all ranks' tokens at once.
    for bank in whole:
        bank.A.requires_grad_(not case.frozen)
        bank.B.requires_grad_(not case.frozen)
    wanted = []
    for x, routes, cots in inputs:
        x, routes = leaves(x, routes)
        outs = [dense(x, route, bank) for route, bank in zip(routes, whole, strict=True)]
        sum((out * cot).sum() for out, cot in zip(outs, cots, strict=True)).backward()
        wanted.append((outs, x.grad, [route.weights.grad for route in routes]))

    owned = torch.tensor(placement.owned(mesh.expert_rank), dtype=torch.int64)
    banks = []
    for bank in whole:
        part = SiteBank(bank.A.detach()[owned], bank.B.detach()[owned], bank.scale[owned], bank.eligible[owned])
        part.A.requires_grad_(not case.frozen)
        part.B.requires_grad_(not case.frozen)
        banks.append(part)
    sites = [f"site{index}" for index in range(len(banks))]
    scales = {site: bank.scale for site, bank in zip(sites, whole, strict=True)}
    dispatch = Dispatch(mesh, placement, strategy, scales, torch.device("cpu"))
    own_x, own_routes, cots = inputs[mesh.rank]
    for _ in range(2 if case.frozen else 1):  # the second time from the cache
        x, routes = leaves(own_x, own_routes)
        with count_traffic() as traffic:
            outs = dispatch(x, sites, routes, banks)
            sum((out * cot).sum() for out, cot in zip(outs, cots, strict=True)).backward()
    reference = wanted[mesh.rank]
    pairs = list(zip(outs, reference[0], strict=True))
    pairs.append((x.grad, reference[1]))
    pairs += [
        (route.weights.grad.masked_fill(route.expert_ids < 0, 0), grad)
        for route, grad in zip(routes, reference[2], strict=True)
    ]
    for part, bank in zip(banks, whole, strict=True):
        if not case.frozen:
            pairs.append((mesh.sum_over_replicas(part.A.grad), bank.A.grad[owned]))
            pairs.append((mesh.sum_over_replicas(part.B.grad), bank.B.grad[owned]))
    return max(_error(ours, formula) for ours, formula in pairs), traffic, mesh.expert_rank


def _error(ours: torch.Tensor, formula: torch.Tensor) -> float:
    assert ours.shape == formula.shape
    if not formula.numel():
        return 0.0
    ours, formula = ours.detach().double(), formula.detach().double()
    return float((ours - formula).abs().max() / formula.abs().max().clamp_min(1e-3))


def run_cases(cases: list[tuple[Case, str]], expert_parallel: int) -> list[tuple[float, Traffic, int]]:
    return [run_case(case, strategy, expert_parallel) for case, strategy in cases]
