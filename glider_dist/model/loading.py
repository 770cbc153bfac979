"""Read a pool's experts into stacked banks: all of them, or the part that this rank owns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from glider_dist.errors import GliderError
from glider_dist.lora.bank import SiteBank, stack_site
from glider_dist.model.sites import every_linear
from glider_dist.parallel.exchange import gather_objects
from glider_dist.parallel.mesh import Mesh
from glider_dist.parallel.placement import Placement
from glider_dist.pool import Expert, ExpertPool
from glider_dist.pool.adapter import SiteLora, check_finite
from glider_dist.pool.fingerprint import check_gate, check_sites

Gates = dict[str, torch.Tensor]


def load_banks(
    model: nn.Module, pool: ExpertPool, dtype: torch.dtype, with_gates: bool
) -> tuple[dict[str, SiteBank], Gates]:
    """Read every expert and stack it per site, on the CPU.

    Returns:
        ``{site: SiteBank}`` in ``dtype``, and ``{site: [E, d_in]}`` fp32 raw gates (zeros where an expert does
        not adapt the site); gates are empty unless ``with_gates``.
    """
    known = {name: site.shape for name, site in every_linear(model).items()}
    weights = [_read(expert, known) for expert in pool.experts()]
    used = [site for site in known if any(site in loras for loras in weights)]
    banks = {site: stack_site([loras.get(site) for loras in weights], known[site], dtype) for site in used}
    return banks, _stack_gates(pool, used, known, dtype) if with_gates else {}


@dataclass(frozen=True)
class Part:
    """What a rank holds of a pool whose experts are shared by P ranks, on the CPU.

    Attributes:
        banks: ``{site: SiteBank}`` of its own experts, padded to the largest LoRA rank of the whole pool.
        gates: ``{site: [E, d_in]}`` of all experts; empty if not asked for.
        scales: ``{site: [E]}`` fp32 of all experts.
        eligible: ``{site: [E] bool}`` of all experts.
    """

    banks: dict[str, SiteBank]
    gates: Gates
    scales: dict[str, torch.Tensor]
    eligible: dict[str, torch.Tensor]


def load_part(
    model: nn.Module, pool: ExpertPool, dtype: torch.dtype, with_gates: bool, mesh: Mesh, placement: Placement
) -> Part:
    """Read this rank's own experts, and exchange what all ranks must know of each other's (a collective).

    Raises:
        GliderError: on every rank, if one of them cannot read its experts.
    """
    known = {name: site.shape for name, site in every_linear(model).items()}
    owned, experts = placement.owned(mesh.expert_rank), pool.experts()
    message: str | None = None
    weights: dict[int, dict[str, SiteLora]] = {}
    try:
        weights = {expert: _read(experts[expert], known) for expert in owned}
    except GliderError as error:
        message = str(error)  # the others would wait
    if message := next(filter(None, gather_objects("errors of reading", message)), None):
        raise GliderError(message)
    own = {
        expert: {site: (lora.A.shape[0], lora.scale) for site, lora in loras.items()}
        for expert, loras in weights.items()
    }
    everyone = gather_objects("shapes of experts", own, mesh.expert_group)
    facts: dict[int, dict[str, tuple[int, float]]] = {
        expert: sites for part in everyone for expert, sites in part.items()
    }
    used = [site for site in known if any(site in sites for sites in facts.values())]
    banks, scales, eligible = {}, {}, {}
    for site in used:
        rank = max(sites[site][0] for sites in facts.values() if site in sites)
        banks[site] = stack_site([weights[expert].get(site) for expert in owned], known[site], dtype, rank)
        each = [facts[expert].get(site) for expert in range(len(pool.names))]
        scales[site] = torch.tensor([0.0 if fact is None else fact[1] for fact in each])
        eligible[site] = torch.tensor([fact is not None for fact in each])
    return Part(banks, _stack_gates(pool, used, known, dtype) if with_gates else {}, scales, eligible)


def _read(expert: Expert, known: dict[str, tuple[int, int]]) -> dict[str, SiteLora]:
    loras = expert.weights()
    check_sites(expert.name, {site: (lora.B.shape[0], lora.A.shape[1]) for site, lora in loras.items()}, known)
    check_finite(expert.name, loras)
    return loras


def _stack_gates(
    pool: ExpertPool, used: list[str], known: dict[str, tuple[int, int]], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    gates = []
    for expert in pool.experts():
        gate = expert.gate()
        check_gate(expert.name, gate, expert.shapes())
        gates.append(gate)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    stacked = {}
    for site in used:
        zero = torch.zeros(known[site][1])
        stacked[site] = torch.stack([gate.get(site, zero) for gate in gates]).to(wide)
    return stacked
