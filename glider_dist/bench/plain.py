"""The two dispatchers that ours is compared with: plain token exchange, and DeepSpeed's own MoE layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from glider_dist.lora.bank import SiteBank
from glider_dist.lora.grouped import grouped_product
from glider_dist.model.zero import import_deepspeed
from glider_dist.routing.route import Route


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, send: list[int], receive: list[int], group: Any) -> torch.Tensor:
        ctx.sizes = send, receive, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        send, receive, group = ctx.sizes
        out = grads[0].new_empty(sum(send), *grads[0].shape[1:])
        dist.all_to_all_single(out, grads[0].contiguous(), send, receive, group=group)
        return out, None, None, None


def plain_all_to_all(x_Td: torch.Tensor, route: Route, bank: SiteBank, experts: int, group: Any) -> torch.Tensor:
    """One row per (token, expert) to the expert's owner and back, as in torchtitan; weighted at home.

    Args:
        bank: this rank's experts: the same number on every rank, contiguous.
        experts: E.
    """
    ranks = dist.get_world_size(group)
    ids_R = route.expert_ids.flatten()
    order = ids_R.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64).scatter_add_(0, ids_R, torch.ones_like(ids_R)).view(ranks, -1)
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    send, receive = counts.sum(1).tolist(), arriving.sum(1).tolist()
    token = order // route.expert_ids.shape[1]
    rows = _AllToAll.apply(x_Td.index_select(0, token), send, receive, group)
    # Rows arrive by rank and, within a rank, by expert.
    expert = torch.arange(counts.shape[1]).repeat(ranks).repeat_interleave(arriving.flatten())
    regroup = expert.argsort(stable=True)
    ends = arriving.sum(0).cumsum(0).to(torch.int32)
    h = grouped_product(rows.index_select(0, regroup), bank.A.transpose(1, 2), ends)
    out = grouped_product(h * bank.scale[expert[regroup]][:, None], bank.B, ends)
    back = _AllToAll.apply(out.index_select(0, regroup.argsort()), receive, send, group)
    weighted = back * route.weights.flatten()[order][:, None]
    return x_Td.new_zeros(x_Td.shape[0], bank.B.shape[2]).index_add(0, token, weighted)


class LoraExpert(nn.Module):
    """One LoRA as DeepSpeed's MoE layer wants its experts: a module on ``[rows, d]``."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.A = nn.Linear(width, rank, bias=False)
        self.B = nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.B(self.A(x))
        return result


def deepspeed_moe(width: int, rank: int, experts: int, ranks: int, top_k: int) -> nn.Module:
    """DeepSpeed's MoE layer of LoRA experts over all ranks, nothing dropped; torch.distributed must be up."""
    deepspeed = import_deepspeed()
    from deepspeed.moe.layer import MoE

    deepspeed.init_distributed("gloo", verbose=False)
    layer: Any = MoE(width, LoraExpert(width, rank), experts, ep_size=ranks, k=top_k, drop_tokens=False)
    layer.set_deepspeed_parallelism()
    module: nn.Module = layer
    return module
