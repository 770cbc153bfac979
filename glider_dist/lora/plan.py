"""Plan: the rows of a Route, one per token and expert, sorted by expert, in the form that suits their device.

Legend: T tokens, K experts per token, R = rows (one per token and expert), E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from glider_dist.lora.bank import SiteBank
from glider_dist.lora.grouped import is_one_kernel
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
