"""Plan, compute and combine: from a Route to the experts' weighted output, added to the base output.

Legend: T tokens, K experts per token, R = rows (one per token and expert), E experts, r rank, d and o widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from glider_dist.lora.bank import SiteBank
from glider_dist.lora.grouped import grouped_product, is_one_kernel
from glider_dist.routing.route import Route

# In half precision a CPU takes about 20 µs to start a product, whatever its size. Groups of up to so many rows are
# padded to equal size and become one batched product, up to 6 times as fast; larger ones gain nothing.
_BATCHED_ROWS = 64


@dataclass(frozen=True)
class Plan:
    """Rows sorted by expert, stably, so that a token's rows keep their order.

    Attributes:
        token: ``[R]`` int64, the token of each row.
        weight: ``[R]`` fp32, the weight of each row (differentiable).
        expert: ``[R]`` int64, the expert of each row, ascending.
        ends: ``[E]`` int32, where each expert's rows end.
        equal: whether every expert has the same number of rows, padding included.
    """

    token: torch.Tensor
    weight: torch.Tensor
    expert: torch.Tensor
    ends: torch.Tensor
    equal: bool = False

    @property
    def counts(self) -> torch.Tensor:
        """``[E]`` int64, rows per expert, padding included."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).to(torch.int64)


def plan_rows(route: Route, num_experts: int, rows: int | None = None) -> Plan:
    """Sort the route's rows by expert.

    Args:
        rows: how many places of a ragged route are used, if the host knows. There is no host sync, except for a
            ragged route (top-p) of which it does not.
    """
    ids_R = route.expert_ids.flatten()
    weight_R = route.weights.flatten()
    top_k = route.expert_ids.shape[1]
    if not route.ragged:
        order = ids_R.argsort(stable=True)
    elif rows is None:
        used = (ids_R >= 0).nonzero().squeeze(1)
        order = used[ids_R[used].argsort(stable=True)]
    else:
        order = ids_R.masked_fill(ids_R < 0, num_experts).argsort(stable=True)[:rows]
    expert_R = ids_R[order]
    # The rows are sorted, so a search finds where each expert's end: no counting pass, no host sync.
    experts_E = torch.arange(num_experts, device=ids_R.device)
    ends_E = torch.searchsorted(expert_R, experts_E, right=True, out_int32=True)
    return Plan(order // top_k, weight_R[order], expert_R, ends_E)


def fitted(plan: Plan, bank: SiteBank, x_Td: torch.Tensor) -> tuple[Plan, SiteBank]:
    """The same rows and experts in the form in which the device of ``x_Td`` computes them fastest.

    If experts far outnumber the rows, those without rows are left out where a group costs something even if it is
    empty (about 1 µs on a CPU; on a GPU without the one kernel a launch, and a host sync in any case). In half
    precision on a CPU small groups are padded to equal size, and the size of larger ones is rounded up so that it
    recurs: oneDNN compiles a kernel for every new number of rows, which takes longer than the product.
    """
    rows, dtype = plan.token.shape[0], x_Td.dtype
    if not rows:
        return plan, bank
    if rows < bank.num_experts // 2 and not is_one_kernel(x_Td.device, dtype):
        active = plan.expert.unique_consecutive()
        bank = bank.select(active)
        ends = torch.searchsorted(plan.expert, active, right=True, out_int32=True)
        plan = Plan(plan.token, plan.weight, torch.searchsorted(active, plan.expert), ends)
    if x_Td.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        mean = rows // bank.num_experts
        multiple = 64 if mean >= 32 else 16 if mean >= 4 else 4
        plan = pad_groups(plan, multiple, equal=int(plan.counts.max()) <= _BATCHED_ROWS)
    return plan, bank


def pad_groups(plan: Plan, multiple: int, equal: bool = False) -> Plan:
    """Lengthen each expert's rows to a multiple, with rows of weight 0 on token 0 that add nothing.

    Costs a host sync on a GPU.

    Args:
        equal: lengthen all of them as much as the longest.
    """
    counts_E = plan.counts
    padded_E = counts_E.amax().expand_as(counts_E) if equal else counts_E
    padded_E = (padded_E + multiple - 1) // multiple * multiple
    ends_E = padded_E.cumsum(0)
    shift_E = (ends_E - padded_E) - (counts_E.cumsum(0) - counts_E)
    slot_R = torch.arange(plan.token.shape[0], device=plan.token.device) + shift_E[plan.expert]
    rows = int(ends_E[-1]) if len(ends_E) else 0
    experts = torch.arange(len(padded_E), device=plan.token.device)
    return Plan(
        plan.token.new_zeros(rows).index_copy(0, slot_R, plan.token),
        plan.weight.new_zeros(rows).index_copy(0, slot_R, plan.weight),
        experts.repeat_interleave(padded_E, output_size=rows),
        ends_E.to(torch.int32),
        equal,
    )


def row_outputs(x_Td: torch.Tensor, bank: SiteBank, plan: Plan, at_R: torch.Tensor) -> torch.Tensor:
    """``w s B A x`` of each planned row; ``[R, o]``."""
    x_Rd = x_Td.index_select(0, at_R)
    h_Rr = grouped_product(x_Rd, bank.A.to(x_Rd.dtype).transpose(1, 2), plan.ends, plan.equal)
    # The weight is applied in rank space, in fp32: r numbers a row instead of o.
    factor_R = plan.weight * bank.scale.to(plan.weight.dtype)[plan.expert]
    h_Rr = scaled(h_Rr, factor_R[:, None])
    return grouped_product(h_Rr, bank.B.to(h_Rr.dtype), plan.ends, plan.equal)


def scaled(h: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``h * factor`` in the wider dtype, rounded to that of ``h``; in place where no gradient is wanted."""
    return (h * factor).to(h.dtype) if torch.is_grad_enabled() else h.mul_(factor)


def add_experts(
    y_To: torch.Tensor, x_Td: torch.Tensor, bank: SiteBank, plan: Plan, tokens: torch.Tensor | None
) -> torch.Tensor:
    """``y + Σ_k w_k s B_k A_k x`` for the planned rows: each expert computes on its own rows alone.

    Args:
        y_To: ``[T, o]`` base output; where no gradient is wanted, it is added to in place.
        x_Td: ``[T, d]`` input of the layer.
        bank: the site's experts (fp32 experts over a bf16 base are cast).
        plan: rows over the routed tokens.
        tokens: ``[T_routed]`` positions of the routed tokens among the T, or None if all are routed.

    Returns:
        ``[T, o]`` in the dtype of ``y_To``.
    """
    plan, bank = fitted(plan, bank, x_Td)
    at_R = plan.token if tokens is None else tokens[plan.token]
    out_Ro = row_outputs(x_Td, bank, plan, at_R).to(y_To.dtype)
    return y_To.index_add(0, at_R, out_Ro) if torch.is_grad_enabled() else y_To.index_add_(0, at_R, out_Ro)


def sum_experts(x_Td: torch.Tensor, bank: SiteBank, route: Route, rows: int | None = None) -> torch.Tensor:
    """``Σ_k w_k s B_k A_k x`` for a bank that is a part of the pool; the route's ids are positions in the bank.

    Args:
        rows: see :func:`plan_rows`.

    Returns:
        ``[T, o]`` fp32 (fp64 for fp64 inputs), summed in order of the bank's experts.
    """
    out_To = route.weights.new_zeros(x_Td.shape[0], bank.B.shape[2])
    if is_small(x_Td, bank, route.expert_ids.shape[1]):
        return add_all_experts(out_To, x_Td, bank, route, None)
    plan = plan_rows(route, bank.num_experts, rows)
    plan, bank = fitted(plan, bank, x_Td)
    return out_To.index_add_(0, plan.token, row_outputs(x_Td, bank, plan, plan.token).to(out_To.dtype))


def is_small(x_Td: torch.Tensor, bank: SiteBank, places: int) -> bool:
    """Whether computing every expert on every token is cheaper than sorting rows and one product per expert.

    So it is while decoding over a small pool. On a CPU (measured with 4, 12 and 20 experts of rank 16, widths 576
    and 1536) a sorted row costs about twice its arithmetic, and the sorting as much as ``sorting`` products of a
    token with a row of A and B.
    """
    if x_Td.device.type != "cpu":
        return _is_small_on_a_gpu(x_Td, bank, places)
    experts, rank, _ = bank.A.shape
    if x_Td.shape[0] > 192 or not 0 < experts * rank <= 320:
        return False
    idle = x_Td.shape[0] * rank * max(0, experts - 2 * places)
    return idle <= (20_000 if x_Td.dtype in (torch.bfloat16, torch.float16) else 5_000)


# Measured on an H100 (bench layer): what sorting costs besides the rows' own copies, mostly the launches of some
# twenty kernels; what a group costs within one kernel and in one of its own; what dense products and copies reach.
_SORTING_S, _GROUP_S, _GROUP_ALONE_S = 4.5e-4, 1.2e-6, 2e-5
_HALF_FLOPS, _FULL_FLOPS, _BANDWIDTH = 6e14, 3e13, 2.5e12


def _is_small_on_a_gpu(x_Td: torch.Tensor, bank: SiteBank, places: int) -> bool:
    """The same on a GPU, where idle experts cost little and launches much: so it is up to hundreds of experts."""
    (tokens, width), element = x_Td.shape, x_Td.element_size()
    columns, out = bank.A.shape[0] * bank.A.shape[1], bank.B.shape[2]
    if not columns or (torch.is_grad_enabled() and columns > places * (width + out)):
        return False  # what a backward keeps: all experts' places in rank space, or the rows' inputs and outputs
    half = x_Td.dtype in (torch.bfloat16, torch.float16)
    moved = columns * (width + out) * bank.A.element_size() + 3 * tokens * columns * element
    every = 2 * tokens * columns * (width + out) / (_HALF_FLOPS if half else _FULL_FLOPS) + moved / _BANDWIDTH
    copied = 4 * tokens * places * (width + out) * element
    if is_one_kernel(x_Td.device, x_Td.dtype):
        groups = _GROUP_S * bank.A.shape[0]
    else:
        groups = _GROUP_ALONE_S * min(bank.A.shape[0], tokens * places)
    return every <= _SORTING_S + groups + copied / _BANDWIDTH


def add_all_experts(
    y_To: torch.Tensor, x_Td: torch.Tensor, bank: SiteBank, route: Route, tokens: torch.Tensor | None
) -> torch.Tensor:
    """The same sum over all experts, with weight 0 where an expert does not serve: two plain products."""
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
    return y_To.index_add(0, tokens, (h_tR @ b_Ro).to(y_To.dtype))


def count_rows(
    expert_ids: torch.Tensor, num_experts: int, ragged: bool = False, before: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows per expert ``[E]`` int64, added in place to ``before`` if given; without a host sync.

    Args:
        expert_ids: int64 of any shape; -1, which counts for none, only if ``ragged``.
    """
    ids_R = expert_ids.flatten()
    if before is None:
        with torch.inference_mode(False):  # else only forwards in inference mode could add to them
            before = torch.zeros(num_experts, dtype=torch.int64, device=ids_R.device)
    if ragged:
        return before.scatter_add_(0, ids_R.clamp_min(0), (ids_R >= 0).to(torch.int64))
    return before.scatter_add_(0, ids_R, _one(ids_R.device).expand(ids_R.shape))


@cache
def _one(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.ones((), dtype=torch.int64, device=device)


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
