"""Tokens travel to the experts' owners and come back: the strategy ``all_to_all``.

Legend: T tokens, K experts per token, S sites that read this input, P ranks, R rows = (token, destination) pairs,
d input width, O = Σ d_out over the sites.

Per exchange, besides the control numbers: two collectives forward (rows out, outputs back) and two backward (their
reverses), no host sync. Bytes that leave a rank with R rows for others, with an element of ``b`` bytes (x) and
weights of ``w`` bytes (4, or 8 in fp64):

    forward    R_out (row_bytes) + R_in O b          row_bytes = d b + S K (w + 4), rounded up to 8
    backward   R_out O b + R_in row_bytes'           the same without slots: d b + S K w, rounded up to 8

``R_out`` rows go to other ranks, ``R_in`` come from them. The shape follows torchtitan's
AllToAllTokenDispatcher and DeepEP (one row per token and rank, however many of its experts live there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from glider_dist.lora.apply import sum_experts
from glider_dist.lora.bank import SiteBank
from glider_dist.parallel.exchange import all_to_all
from glider_dist.routing.route import Route


@dataclass(frozen=True)
class Row:
    """Bytes of one travelling row: the token, its weights, and where they want to go (slots; -1: not there)."""

    width: int
    places: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    with_slots: bool

    @property
    def weights_at(self) -> int:
        return -(-self.width * self.dtype.itemsize // 8) * 8

    @property
    def slots_at(self) -> int:
        return self.weights_at + self.places * self.weight_dtype.itemsize

    @property
    def nbytes(self) -> int:
        return -(-(self.slots_at + self.with_slots * self.places * 4) // 8) * 8

    def buffer(self, rows: int, device: torch.device) -> torch.Tensor:
        return torch.empty(rows, self.nbytes, dtype=torch.uint8, device=device)

    def views(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[R, d]``, ``[R, S K]`` and int32 ``[R, S K]``, all strided views of the buffer ``[R, nbytes]``."""
        weights = self.weights_at // self.weight_dtype.itemsize
        slots = self.slots_at // 4
        return (
            buffer.view(self.dtype)[:, : self.width],
            buffer.view(self.weight_dtype)[:, weights : weights + self.places],
            buffer.view(torch.int32)[:, slots : slots + self.places * self.with_slots],
        )


@dataclass(frozen=True)
class Sizes:
    """Who sends what, as the control exchange told every rank.

    Attributes:
        send: rows to each rank. receive: rows from each rank.
        used: for each site, the (token, expert) pairs among the received rows.
    """

    send: tuple[int, ...]
    receive: tuple[int, ...]
    used: tuple[int, ...]
    group: dist.ProcessGroup


class _Send(torch.autograd.Function):
    """Rows to their destinations; backward brings the gradients of tokens and weights home."""

    @staticmethod
    def forward(
        ctx: Any,
        x_Td: torch.Tensor,
        weight_RW: torch.Tensor,
        slot_RW: torch.Tensor,
        token_R: torch.Tensor,
        sizes: Sizes,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        row = Row(x_Td.shape[1], weight_RW.shape[1], x_Td.dtype, weight_RW.dtype, with_slots=True)
        buffer = row.buffer(token_R.shape[0], x_Td.device)
        x, weights, slots = row.views(buffer)
        torch.index_select(x_Td, 0, token_R, out=x)
        weights.copy_(weight_RW)
        slots.copy_(slot_RW)
        received = all_to_all("tokens", buffer, sizes.send, sizes.receive, sizes.group)
        ctx.sizes, ctx.row, ctx.tokens = sizes, row, x_Td.shape[0]
        ctx.save_for_backward(token_R)
        x, weights, slots = row.views(received)
        ctx.mark_non_differentiable(slots)
        return x, weights, slots

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        (token_R,) = ctx.saved_tensors
        sizes, sent = ctx.sizes, ctx.row
        row = Row(sent.width, sent.places, sent.dtype, sent.weight_dtype, with_slots=False)
        buffer = row.buffer(grads[0].shape[0], grads[0].device)
        x, weights, _ = row.views(buffer)
        x.copy_(grads[0])
        weights.copy_(grads[1])
        back = all_to_all("tokens_grad", buffer, sizes.receive, sizes.send, sizes.group)
        x, weights, _ = row.views(back)
        grad_Td = x.new_zeros(ctx.tokens, row.width).index_add_(0, token_R, x)
        return grad_Td, weights.contiguous(), None, None, None


class _Return(torch.autograd.Function):
    """Outputs back to where their tokens came from; backward sends their gradients out again."""

    @staticmethod
    def forward(ctx: Any, out_RO: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        ctx.sizes = sizes
        return all_to_all("outputs", out_RO, sizes.receive, sizes.send, sizes.group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        sizes = ctx.sizes
        return all_to_all("outputs_grad", grads[0].contiguous(), sizes.send, sizes.receive, sizes.group), None


def tokens_to_experts(
    x_Td: torch.Tensor,
    routes: Sequence[Route],
    banks: Sequence[SiteBank],
    need_PT: torch.Tensor,
    owner: torch.Tensor,
    slot: torch.Tensor,
    sizes: Sizes,
) -> list[torch.Tensor]:
    """``Σ_k w_k s B_k A_k x`` of every token, computed by the experts' owners.

    Args:
        x_Td: ``[T, d]`` this rank's tokens.
        routes: for each site, ``[T, K]`` global expert ids and weights.
        banks: for each site, the experts that this rank owns.
        need_PT: ``[P, T]`` bool, whether any site of the token has an expert on that rank.
        owner, slot: ``[E]`` int64, each expert's rank and its position in that rank's bank.

    Returns:
        For each site ``[T, d_out]`` fp32 (fp64 for fp64 inputs).
    """
    tokens = x_Td.shape[0]
    pair_R = torch.nonzero_static(need_PT.view(-1), size=sum(sizes.send)).squeeze(1)
    token_R, to_R = pair_R % max(tokens, 1), pair_R // max(tokens, 1)
    slots, weights = [], []
    for route in routes:
        ids_RK = route.expert_ids[token_R]
        there_RK = (owner[ids_RK] == to_R[:, None]) & (ids_RK >= 0)
        slots.append(slot[ids_RK].masked_fill(~there_RK, -1))
        weights.append(route.weights[token_R].masked_fill(~there_RK, 0.0))
    x, weight_RW, slot_RW = _Send.apply(x_Td, torch.cat(weights, 1), torch.cat(slots, 1), token_R, sizes)
    outs, place = [], 0
    for route, bank, used in zip(routes, banks, sizes.used, strict=True):
        end = place + route.expert_ids.shape[1]
        arrived = Route(slot_RW[:, place:end].long(), weight_RW[:, place:end], ragged=True)
        outs.append(sum_experts(x, bank, arrived, used).to(x_Td.dtype))
        place = end
    back_RO = _Return.apply(torch.cat(outs, 1), sizes)
    sum_TO = back_RO.new_zeros(tokens, back_RO.shape[1], dtype=routes[0].weights.dtype)
    sum_TO = sum_TO.index_add(0, token_R, back_RO.to(sum_TO.dtype))
    return list(sum_TO.split([bank.B.shape[2] for bank in banks], 1))
