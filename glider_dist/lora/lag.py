"""LAG's second stage: how much a candidate expert would add to a token, ``‖s B A x‖``, computed in rank space.

Legend: T tokens, C candidates per token, R = T·C rows, E experts, r rank, q = min(d_out, r), d and o widths.
"""

from __future__ import annotations

import torch

from glider_dist.lora.bank import SiteBank
from glider_dist.lora.grouped import grouped_product
from glider_dist.lora.plan import plan_rows
from glider_dist.routing.local import at_least_fp32
from glider_dist.routing.route import Route


def norm_factors(bank: SiteBank) -> torch.Tensor:
    """``s_e R_e^T`` with the QR factors ``B_e = Q R_e``, so that ``‖s B h‖ = ‖h (s R^T)‖``; ``[E, r, q]`` fp32.

    The Gram matrix ``B^T B`` would serve as well, but squares the condition number.
    """
    r_Eqr = torch.linalg.qr(at_least_fp32(bank.B).transpose(1, 2), mode="r").R
    return (r_Eqr * bank.scale.abs()[:, None, None]).transpose(1, 2).contiguous()


def delta_norms(
    x_Td: torch.Tensor, bank: SiteBank, factors_Erq: torch.Tensor, candidates_TC: torch.Tensor
) -> torch.Tensor:
    """``‖s_e B_e A_e x‖`` of each token's candidates: each expert computes on its own rows alone.

    ``A x`` has the dtype of x, what follows is fp32 (fp64 for fp64 inputs). The weights count as constants, as
    in prototypes: gradients reach x alone.

    Args:
        x_Td: ``[T, d]`` the tokens.
        factors_Erq: :func:`norm_factors` of the bank.
        candidates_TC: ``[T, C]`` int64, different experts of each token.

    Returns:
        ``[T, C]``.
    """
    ones_TC = torch.ones(candidates_TC.shape, device=x_Td.device)
    plan = plan_rows(Route(candidates_TC, ones_TC), bank.num_experts)
    x_Rd = x_Td.index_select(0, plan.token)
    h_Rr = at_least_fp32(grouped_product(x_Rd, bank.A.detach().to(x_Rd.dtype).transpose(1, 2), plan.ends))
    delta_Rq = grouped_product(h_Rr, factors_Erq.to(h_Rr.dtype), plan.ends)
    # The gradient of sqrt at 0 is infinite.
    norm_R = delta_Rq.square().sum(-1).clamp_min(torch.finfo(delta_Rq.dtype).tiny).sqrt()
    norm_TE = norm_R.new_zeros(x_Td.shape[0], bank.num_experts)
    return norm_TE.index_put((plan.token, plan.expert), norm_R).gather(1, candidates_TC)
