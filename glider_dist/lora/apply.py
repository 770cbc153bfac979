"""Plan, compute and combine: from a Route to the experts' weighted output, added to the base output.

Legend: T tokens, K experts per token, R = rows (one per token and expert), E experts, r rank, d and o widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from glider_dist.lora.bank import SiteBank
from glider_dist.lora.grouped import grouped_linear
from glider_dist.routing.route import Route


@dataclass(frozen=True)
class Plan:
    """Rows sorted by expert, stably, so that a token's rows keep their order.

    Attributes:
        token: ``[R]`` int64, the token of each row.
        weight: ``[R]`` fp32, the weight of each row (differentiable).
        expert: ``[R]`` int64, the expert of each row, ascending.
        ends: ``[E]`` int32, where each expert's rows end.
        counts: ``[E]`` int64, rows per expert.
    """

    token: torch.Tensor
    weight: torch.Tensor
    expert: torch.Tensor
    ends: torch.Tensor
    counts: torch.Tensor


def plan_rows(route: Route, num_experts: int) -> Plan:
    """Sort the route's rows by expert. No host sync, except for a ragged route (top-p), whose unused places go."""
    ids_R = route.expert_ids.flatten()
    weight_R = route.weights.flatten()
    top_k = route.expert_ids.shape[1]
    if route.ragged:
        used = (ids_R >= 0).nonzero().squeeze(1)
        order = used[ids_R[used].argsort(stable=True)]
    else:
        order = ids_R.argsort(stable=True)
    expert_R = ids_R[order]
    # bincount would cost a hidden host sync on a GPU.
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=ids_R.device)
    counts_E.scatter_add_(0, expert_R, torch.ones_like(expert_R))
    ends_E = counts_E.cumsum(0).to(torch.int32)
    return Plan(order // top_k, weight_R[order], expert_R, ends_E, counts_E)


def add_experts(
    y_To: torch.Tensor, x_Td: torch.Tensor, bank: SiteBank, plan: Plan, tokens: torch.Tensor | None
) -> torch.Tensor:
    """``y + Σ_k w_k s B_k A_k x`` for the planned rows.

    Args:
        y_To: ``[T, o]`` base output.
        x_Td: ``[T, d]`` input of the layer.
        bank: the site's experts, in the dtype of ``x_Td`` (fp32 experts over a bf16 base are cast).
        plan: rows over the routed tokens.
        tokens: ``[T_routed]`` positions of the routed tokens among the T, or None if all are routed.

    Returns:
        ``[T, o]`` in the dtype of ``y_To``.
    """
    at_R = plan.token if tokens is None else tokens[plan.token]
    x_Rd = x_Td.index_select(0, at_R)
    h_Rr = grouped_linear(x_Rd, bank.A.to(x_Rd.dtype), plan.ends)
    # The weight is applied in rank space, in fp32: r numbers a row instead of o.
    factor_R = plan.weight * bank.scale.to(plan.weight.dtype)[plan.expert]
    h_Rr = (h_Rr.to(factor_R.dtype) * factor_R[:, None]).to(x_Rd.dtype)
    return y_To.index_add(0, at_R, grouped_linear(h_Rr, bank.B.to(h_Rr.dtype), plan.ends).to(y_To.dtype))


def add_single_expert(
    y_To: torch.Tensor, x_Td: torch.Tensor, bank: SiteBank, weight_T: torch.Tensor | None
) -> torch.Tensor:
    """The same for a bank of one expert that serves every token: two plain products, nothing sorted or copied.

    Args:
        weight_T: ``[T]`` the expert's weight for each token, or None for 1.
    """
    h_Tr = F.linear(x_Td, bank.A[0].to(x_Td.dtype))
    factor = bank.scale if weight_T is None else (weight_T * bank.scale.to(weight_T.dtype))[:, None]
    h_Tr = (h_Tr.to(factor.dtype) * factor).to(x_Td.dtype)
    return torch.addmm(y_To, h_Tr, bank.B[0].t().to(h_Tr.dtype))
