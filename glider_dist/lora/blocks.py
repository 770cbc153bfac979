"""Experts assigned to whole queries: equal blocks of the batch, each served by one expert, without sorting tokens.

A batch whose queries have their experts is already in groups: a block is a view of the input, nothing is copied to
an expert and back, and one batched product serves them all. Padding is computed along with its query, as its base
output is, and changes nothing that is read.

Legend: B queries, T tokens (padding included), G blocks, t tokens of a block, E experts, r rank, d and o widths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glider_dist.lora.apply import scaled
from glider_dist.lora.bank import SiteBank
from glider_dist.routing.local import exact_product


@dataclass(frozen=True)
class Blocks:
    """The batch as G runs of equally many queries.

    Attributes:
        expert: ``[G]`` int64, the expert of each block.
        all_experts: whether block i is served by expert i, so that the bank is used as it is.
    """

    expert: torch.Tensor
    all_experts: bool

    @staticmethod
    def of(expert_of_query: Sequence[int], num_experts: int, device: torch.device) -> Blocks:
        """The fewest blocks: those of the greatest length that divides every run of queries with one expert."""
        runs = [len(list(run)) for _, run in itertools.groupby(expert_of_query)]
        chosen = list(expert_of_query[:: math.gcd(*runs) or 1])
        chosen_G = torch.tensor(chosen, dtype=torch.int64).to(device, non_blocking=True)
        return Blocks(chosen_G, chosen == list(range(num_experts)))

    def fit(self, x_Td: torch.Tensor, bank: SiteBank) -> bool:
        """Whether a block has as many tokens as an expert has rows, so that its weights are worth a copy."""
        return len(self.expert) > 0 and x_Td.shape[0] >= len(self.expert) * bank.A.shape[1]


def add_blocks(
    y_To: torch.Tensor, x_Td: torch.Tensor, bank: SiteBank, blocks: Blocks, gates_Ed: torch.Tensor | None
) -> torch.Tensor:
    """``y + w s B A x`` with each query's expert; ``w`` is 1, or ``σ(v·x)`` with the raw gate vector ``v``.

    Args:
        y_To: ``[T, o]`` base output.
        x_Td: ``[T, d]`` input of the layer, the queries one after another.
        bank: the site's experts (fp32 experts over a bf16 base are cast, their gradients summed in fp32).
        gates_Ed: ``[E, d]`` raw gate vectors, or None.

    Returns:
        ``[T, o]`` in the dtype of ``y_To``.
    """

    def of_blocks(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if blocks.all_experts else tensor.index_select(0, blocks.expert)

    x_Gtd = x_Td.reshape(len(blocks.expert), -1, x_Td.shape[1])
    h_Gtr = torch.bmm(x_Gtd, of_blocks(bank.A).to(x_Td.dtype).transpose(1, 2))
    # The weight is applied in rank space, in fp32: r numbers a token instead of o.
    exact = torch.promote_types(x_Td.dtype, torch.float32)
    factor_G11 = of_blocks(bank.scale).to(exact)[:, None, None]
    if gates_Ed is not None:
        gates_Gd1 = of_blocks(gates_Ed).to(exact)[:, :, None]
        factor_G11 = factor_G11 * exact_product(x_Gtd.to(exact), gates_Gd1).sigmoid()
    h_Gtr = scaled(h_Gtr, factor_G11)
    out_Gto = torch.bmm(h_Gtr, of_blocks(bank.B).to(x_Td.dtype))
    return y_To + out_Gto.view_as(y_To).to(y_To.dtype)
