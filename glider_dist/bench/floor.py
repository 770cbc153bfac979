"""The least that ``gather`` could take: its three collectives, its products, planned and packed beforehand, and
the memory of the owner's gradient, which optimizers want whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from glider_dist.lora.apply import row_outputs
from glider_dist.lora.bank import SiteBank
from glider_dist.lora.plan import plan_rows
from glider_dist.parallel.mesh import Mesh
from glider_dist.parallel.placement import Placement
from glider_dist.routing.route import Route


def gather_floor(
    x_Td: torch.Tensor, route: Route, rank: int, mesh: Mesh, placement: Placement
) -> Callable[[], None]:
    """Forward and backward of one site of equal widths without any decision, plan, packing or sum at the owner: of
    the gradient of its experts only the zeros are written, which a dispatcher of any kind has to.

    Args:
        rank: LoRA rank of the experts.
    """
    me, ranks, width = mesh.expert_rank, mesh.expert_parallel, x_Td.shape[1]
    used = route.expert_ids.unique()
    owner = torch.tensor(placement.owner)[used]
    wanted = [int((owner == other).sum()) * (other != me) for other in range(ranks)]
    asked: list[list[int]] = [[] for _ in range(ranks)]
    dist.all_gather_object(asked, wanted, group=mesh.expert_group)
    size = 2 * rank * width
    receive, send = [count * size for count in wanted], [row[me] * size for row in asked]
    arriving, leaving = torch.zeros(sum(receive)), torch.zeros(sum(send))
    numbers = torch.zeros(8 * ranks + len(placement.names), dtype=torch.uint8)
    everyone = [torch.zeros_like(numbers) for _ in range(ranks)]
    count, owned = len(used), len(placement.owned(me))
    bank = SiteBank(
        torch.randn(count, rank, width).requires_grad_(),
        torch.randn(count, rank, width).requires_grad_(),
        torch.ones(count),
        torch.ones(count, dtype=torch.bool),
    )
    plan = plan_rows(Route(torch.searchsorted(used, route.expert_ids), route.weights), count)

    def step() -> None:
        dist.all_gather(everyone, numbers, group=mesh.expert_group)
        dist.all_to_all_single(arriving, leaving, receive, send, group=mesh.expert_group)
        rows = row_outputs(x_Td, bank, plan, plan.token)
        torch.zeros(x_Td.shape[0], width).index_add_(0, plan.token, rows).sum().backward()
        dist.all_to_all_single(leaving, arriving, send, receive, group=mesh.expert_group)
        torch.zeros(owned, 2, rank, width)

    return step
