"""Compute and combine: from a Route to the experts' weighted output, added to the base output.

Legend: T tokens (t of them routed), K experts per token, R = rows (one per token and expert), E experts, r rank,
d and o widths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from glider_dist.lora import ways
from glider_dist.lora.bank import SiteBank
from glider_dist.lora.grouped import grouped_product
from glider_dist.lora.plan import Plan, fitted, plan_rows
from glider_dist.routing.route import Route


def add_experts(
    y_To: torch.Tensor,
    x_Td: torch.Tensor,
    bank: SiteBank,
    route: Route,
    tokens: torch.Tensor | None,
    rows: int | None = None,
) -> torch.Tensor:
    """``y + Σ_k w_k s B_k A_k x``, by whichever way is cheapest for these sizes; all give the same sum.

    Args:
        y_To: ``[T, o]`` base output; where no gradient is wanted, it may be added to in place.
        x_Td: ``[T, d]`` input of the layer.
        bank: the site's experts (fp32 experts over a bf16 base are cast); the route's ids are positions in it.
        route: experts of the routed tokens.
        tokens: ``[t]`` positions of the routed tokens among the T, or None if all are routed.
        rows: see :func:`glider_dist.lora.plan.plan_rows`.

    Returns:
        ``[T, o]`` in the dtype of ``y_To``.
    """
    way = ways.cheapest_way(route.expert_ids.shape[0], route.expert_ids.shape[1], x_Td, bank)
    if way == "every":
        return _add_every_expert(y_To, x_Td, bank, route, tokens)
    if way == "each":
        return _add_each_row(y_To, x_Td, bank, route, tokens)
    plan, bank = fitted(plan_rows(route, bank.num_experts, rows), bank, x_Td)
    at_R = plan.token if tokens is None else tokens[plan.token]
    return _added(y_To, at_R, row_outputs(x_Td, bank, plan, at_R))


def sum_experts(x_Td: torch.Tensor, bank: SiteBank, route: Route, rows: int | None = None) -> torch.Tensor:
    """``Σ_k w_k s B_k A_k x`` for a bank that is a part of the pool; the route's ids are positions in the bank.

    Args:
        rows: see :func:`glider_dist.lora.plan.plan_rows`.

    Returns:
        ``[T, o]`` fp32 (fp64 for fp64 inputs).
    """
    return add_experts(route.weights.new_zeros(x_Td.shape[0], bank.B.shape[2]), x_Td, bank, route, None, rows)


def row_outputs(x_Td: torch.Tensor, bank: SiteBank, plan: Plan, at_R: torch.Tensor) -> torch.Tensor:
    """``w s B A x`` of each planned row: each expert computes on its own rows alone; ``[R, o]``."""
    x_Rd = x_Td.index_select(0, at_R)
    h_Rr = grouped_product(x_Rd, bank.A.to(x_Rd.dtype).transpose(1, 2), plan.ends, plan.equal)
    # The weight is applied in rank space, in fp32: r numbers a row instead of o.
    factor_R = plan.weight * bank.scale.to(plan.weight.dtype)[plan.expert]
    h_Rr = scaled(h_Rr, factor_R[:, None])
    return grouped_product(h_Rr, bank.B.to(h_Rr.dtype), plan.ends, plan.equal)


def _add_every_expert(
    y_To: torch.Tensor, x_Td: torch.Tensor, bank: SiteBank, route: Route, tokens: torch.Tensor | None
) -> torch.Tensor:
    """Every expert on every token, with weight 0 where it does not serve: two plain products."""
    x_td = x_Td if tokens is None else x_Td.index_select(0, tokens)
    experts, rank, _ = bank.A.shape
    weight_tE = route.weights.new_zeros(x_td.shape[0], experts)
    if route.ragged:
        # Unused places (-1) have weight 0, so they may add to any expert.
        weight_tE = weight_tE.scatter_add_(1, route.expert_ids.clamp_min(0), route.weights)
    else:
        weight_tE = weight_tE.scatter_(1, route.expert_ids, route.weights)
    factor_tE = weight_tE * bank.scale.to(weight_tE.dtype)
    h_tEr = F.linear(x_td, bank.A.to(x_td.dtype).flatten(0, 1)).view(-1, experts, rank)
    h_tR = scaled(h_tEr, factor_tE[:, :, None]).flatten(1)
    b_Ro = bank.B.to(h_tR.dtype).flatten(0, 1)
    if tokens is None:
        return torch.addmm(y_To, h_tR, b_Ro) if y_To.dtype == h_tR.dtype else y_To + h_tR @ b_Ro
    return _added(y_To, tokens, h_tR @ b_Ro)


def _add_each_row(
    y_To: torch.Tensor, x_Td: torch.Tensor, bank: SiteBank, route: Route, tokens: torch.Tensor | None
) -> torch.Tensor:
    """Each row reads the A and B of its own expert where they are: nothing is sorted, copied or padded.

    ``B h`` is a bag of K·r weighted rows of the stacked B for each token. ``A x`` are the products of a token with
    K·r rows of the stacked A: PyTorch has them as the gradient of such a bag by its weights, so that this way has
    no gradient of its own.
    """
    x_td = (x_Td if tokens is None else x_Td.index_select(0, tokens)).to(bank.A.dtype)
    count, places = route.expert_ids.shape
    rank = bank.A.shape[1]
    # Unused places (-1) have weight 0, so they may read any expert.
    ids_tK = route.expert_ids.clamp_min(0) if route.ragged else route.expert_ids
    read_tKr = ids_tK[:, :, None] * rank + torch.arange(rank, device=ids_tK.device)
    starts_t = torch.arange(0, read_tKr.numel(), places * rank, device=ids_tK.device)
    bag_N = torch.arange(count, device=ids_tK.device).repeat_interleave(places * rank)
    h_N = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x_td, bank.A.flatten(0, 1), read_tKr.flatten(), starts_t, bag_N, 0
    )
    factor_tK = route.weights * bank.scale.to(route.weights.dtype)[ids_tK]
    h_tKr = scaled(h_N.view(read_tKr.shape), factor_tK[:, :, None])
    out_to = F.embedding_bag(
        read_tKr.flatten(1), bank.B.flatten(0, 1), per_sample_weights=h_tKr.flatten(1), mode="sum"
    )
    return y_To.add_(out_to) if tokens is None else _added(y_To, tokens, out_to)


def _added(y_To: torch.Tensor, at_R: torch.Tensor, out_Ro: torch.Tensor) -> torch.Tensor:
    out_Ro = out_Ro.to(y_To.dtype)
    return y_To.index_add(0, at_R, out_Ro) if torch.is_grad_enabled() else y_To.index_add_(0, at_R, out_Ro)


def add_single_expert(
    y_To: torch.Tensor, x_Td: torch.Tensor, bank: SiteBank, weight_T: torch.Tensor | None
) -> torch.Tensor:
    """The same for a bank of one expert that serves every token: nothing is sorted, copied or counted.

    Args:
        weight_T: ``[T]`` the expert's weight for each token, or None for 1.
    """
    h_Tr = F.linear(x_Td, bank.A[0].to(x_Td.dtype))
    scale = bank.scale.to(torch.promote_types(x_Td.dtype, torch.float32))
    factor = scale if weight_T is None else (weight_T * scale)[:, None]
    h_Tr = scaled(h_Tr, factor)
    return torch.addmm(y_To, h_Tr, bank.B[0].to(h_Tr.dtype))


def scaled(h: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``h * factor`` in the wider dtype, rounded to that of ``h``; in place where no gradient is wanted."""
    return (h * factor).to(h.dtype) if torch.is_grad_enabled() else h.mul_(factor)
