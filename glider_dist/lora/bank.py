"""Experts stacked per site: the form in which they are computed, trained and moved.

Legend: E experts, r rank (padded to the largest of the site, and to a multiple of 8), d_in and d_out widths.
Padding with zero rows of A and zero columns of B changes no output.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from glider_dist.pool.adapter import SiteLora
from glider_dist.seed import seed_of

RANK_MULTIPLE = 8


@dataclass
class SiteBank:
    """All experts of one site.

    Attributes:
        A: ``[E, r, d_in]``.
        B: ``[E, r, d_out]``, each expert's B transposed, so that all of them are one ``[E·r, d_out]`` matrix.
        scale: ``[E]`` fp32, the factor on ``B A`` (lora_alpha / r, or / sqrt(r) for rsLoRA).
        eligible: ``[E]`` bool; False where an expert does not adapt this site.
        ranks: each expert's own rank without padding, 0 where it does not adapt this site; by default r.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: torch.Tensor
    eligible: torch.Tensor
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.ranks and self.A.shape[0]:
            self.ranks = tuple(self.A.shape[1] if adapted else 0 for adapted in self.eligible.tolist())

    @cached_property
    def all_eligible(self) -> bool:
        """Whether every expert adapts this site; known on the host, so that asking waits for no device."""
        return all(self.ranks)

    @property
    def num_experts(self) -> int:
        return self.A.shape[0]

    def to(self, device: torch.device, dtype: torch.dtype) -> SiteBank:
        return replace(
            self,
            A=self.A.to(device, dtype),
            B=self.B.to(device, dtype),
            scale=self.scale.to(device),
            eligible=self.eligible.to(device),
        )

    def select(self, experts: torch.Tensor) -> SiteBank:
        """The experts at the given positions, int64, for computing; differentiable, without a host sync."""
        part = copy(self)
        part.A, part.B = self.A.index_select(0, experts), self.B.index_select(0, experts)
        part.scale, part.eligible = self.scale[experts], self.eligible[experts]
        return part

    def nbytes(self) -> int:
        return self.A.nbytes + self.B.nbytes


def padded_rank(rank: int) -> int:
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def stack_site(
    loras: list[SiteLora | None], shape: tuple[int, int], dtype: torch.dtype, rank: int | None = None
) -> SiteBank:
    """Stack one site of E experts; None where an expert does not adapt it.

    Args:
        loras: one entry per expert, in the pool's order.
        shape: ``(d_out, d_in)`` of the site.
        dtype: dtype of the stacked weights.
        rank: the largest rank of the site, if other experts of the pool have a larger one.
    """
    d_out, d_in = shape
    rank = padded_rank(rank or max((lora.A.shape[0] for lora in loras if lora is not None), default=1))
    a_Erd = torch.zeros(len(loras), rank, d_in, dtype=dtype)
    b_Ero = torch.zeros(len(loras), rank, d_out, dtype=dtype)
    scale = torch.zeros(len(loras))
    for index, lora in enumerate(loras):
        if lora is not None:
            a_Erd[index, : lora.A.shape[0]] = lora.A
            b_Ero[index, : lora.B.shape[1]] = lora.B.t()
            scale[index] = lora.scale
    ranks = tuple(0 if lora is None else lora.A.shape[0] for lora in loras)
    return SiteBank(
        a_Erd, b_Ero, scale, torch.tensor([lora is not None for lora in loras], dtype=torch.bool), ranks
    )


def initial_site(
    names: Iterable[str], site: str, shape: tuple[int, int], rank: int, alpha: float, seed: int
) -> SiteBank:
    """Fresh fp32 experts: A ~ N(0, 0.01²), B = 0 (PHATGOOSE, ``moe_lora_rank16.gin``).

    The values follow from the seed, the expert's name and the site alone, so an expert starts the same
    wherever and with whomever it is trained.
    """
    d_out, d_in = shape
    rows = []
    for name in names:
        generator = torch.Generator().manual_seed(seed_of(seed, name, site))
        rows.append(torch.randn(rank, d_in, generator=generator) * 0.01)
    count = len(rows)
    scale = torch.full((count,), alpha / rank)
    return SiteBank(torch.stack(rows), torch.zeros(count, rank, d_out), scale, torch.ones(count, dtype=torch.bool))
