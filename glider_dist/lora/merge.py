"""One static expert from many, and experts less what they have in common. Nothing is trained.

Legend: E experts, r rank, d and o widths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from glider_dist.errors import GliderError
from glider_dist.lora.bank import SiteBank

Method = Literal["merged", "ties", "dare"]


def merge_banks(
    banks: dict[str, SiteBank], method: Method, density: float = 0.5, seed: int = 0
) -> dict[str, SiteBank]:
    """Merge all experts of each site into one.

    ``merged`` is the exact mean of the deltas (:func:`merge_site`). ``ties`` and ``dare`` are PEFT's
    ``add_weighted_adapter`` with ``combination_type`` ``"ties"`` (weights 1: TIES takes a mean itself) and
    ``"dare_linear"`` (weights 1/E), which merge the A of all experts and the B of all experts, each by itself.
    They work on the CPU, so that a seed drops the same weights on every device.

    Args:
        density: share of the weights that ties and dare keep.
        seed: of the weights that dare drops; the sites are drawn in their order, as PEFT does.

    Raises:
        GliderError: ties and dare: the experts of a site have different ranks.
    """
    if method == "merged":
        return {site: merge_site(bank) for site, bank in banks.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {site: _merge_halves(site, bank, method, density) for site, bank in banks.items()}


def merge_site(bank: SiteBank) -> SiteBank:
    """The mean of the experts' ``s B A`` as one expert of rank E·r (exact, nothing is truncated).

    Experts that do not adapt the site count as zero, as in PEFT's ``add_weighted_adapter`` with equal weights.
    """
    a_1Rd = bank.A.flatten(0, 1)[None]
    weight_E = bank.scale.to(torch.promote_types(bank.B.dtype, torch.float32)) / bank.num_experts
    weighted_Ero = (bank.B * weight_E[:, None, None]).to(bank.B.dtype)
    b_1Ro = weighted_Ero.flatten(0, 1)[None]
    return SiteBank(a_1Rd.contiguous(), b_1Ro.contiguous(), bank.scale.new_ones(1), bank.eligible.any()[None])


def _merge_halves(site: str, bank: SiteBank, method: Method, density: float) -> SiteBank:
    from peft.utils.merge_utils import dare_linear, task_arithmetic, ties

    experts = [e for e, rank in enumerate(bank.ranks) if rank]
    rank = common_rank(site, bank, experts, f"router.kind={method}", "router.kind=merged")
    weight = 1.0 if method == "ties" else 1 / bank.num_experts
    weights = [weight * float(bank.scale[e]) for e in experts]
    roots = torch.tensor([math.sqrt(abs(value)) for value in weights])
    signs = torch.tensor([math.copysign(1.0, value) for value in weights])
    merged = []
    # PEFT keeps B as [o, r]; which weights dare drops depends on the order in memory.
    for half, factors in ((bank.A[:, :rank], roots * signs), (bank.B[:, :rank].transpose(1, 2), roots)):
        tensors = [half[e].detach().cpu().contiguous() for e in experts]
        if bank.num_experts == 1:
            merged.append(task_arithmetic(tensors, factors))
        elif method == "ties":
            merged.append(ties(tensors, factors, density))
        else:
            merged.append(dare_linear(tensors, factors, density))
    a_rd, b_or = (half.to(bank.A.device, bank.A.dtype) for half in merged)
    a_1rd, b_1ro = torch.zeros_like(bank.A[:1]), torch.zeros_like(bank.B[:1])
    a_1rd[0, :rank], b_1ro[0, :rank] = a_rd, b_or.t()
    return SiteBank(a_1rd, b_1ro, bank.scale.new_ones(1), bank.eligible.any()[None], (rank,))


def subtract_general(site: str, bank: SiteBank, general: Sequence[int]) -> SiteBank:
    """Every other expert less the mean of the general ones, which are then not eligible.

    As PEFT does it (``ArrowLoraLinearLayer.gen_know_sub``, after GenKnowSub, 2505.10939): the mean A is subtracted
    from A and the mean B from B, whatever the scales. That is not the difference of the deltas,
    ``(B - B')(A - A') ≠ B A - B' A'``, but leaves the rank, and so the cost of every token, as it was. The price
    is a second copy of the experts.

    Raises:
        GliderError: the experts have different ranks.
    """
    members = [e for e in general if bank.ranks[e]]
    eligible = bank.eligible.clone()
    eligible[list(general)] = False
    ranks = tuple(0 if e in general else rank for e, rank in enumerate(bank.ranks))
    if not members:
        return replace(bank, eligible=eligible, ranks=ranks)
    experts = [e for e, rank in enumerate(bank.ranks) if rank]
    common_rank(site, bank, experts, "router.general", "a router without it")
    adapted_E11 = bank.eligible[:, None, None]
    a_Erd = bank.A.detach() - bank.A.detach()[members].mean(0) * adapted_E11
    b_Ero = bank.B.detach() - bank.B.detach()[members].mean(0) * adapted_E11
    return replace(bank, A=a_Erd, B=b_Ero, eligible=eligible, ranks=ranks)


def common_rank(site: str, bank: SiteBank, experts: Sequence[int], wanted_by: str, instead: str) -> int:
    """The rank of all these experts; raises GliderError if they differ."""
    ranks = sorted({bank.ranks[e] for e in experts})
    if len(ranks) > 1:
        raise GliderError(
            f"{wanted_by} needs experts of one rank, but at {site} they have ranks "
            f"{', '.join(map(str, ranks))}; choose {instead}"
        )
    return ranks[0]
