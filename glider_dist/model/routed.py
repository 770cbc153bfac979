"""The routed linear: the base layer, called as a module, plus the experts that its context chooses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from glider_dist.lora.apply import add_experts, add_single_expert
from glider_dist.lora.blocks import add_blocks
from glider_dist.model.context import RoutingContext


def routed_layers(model: nn.Module) -> dict[str, RoutedLinear]:
    """The routed layers of an attached model by their site."""
    return {module.site: module for module in model.modules() if isinstance(module, RoutedLinear)}


class RoutedLinear(nn.Module):
    """Wraps one linear layer. The base layer's weight is never read, so that ZeRO 3, quantised and
    tensor-parallel layers work underneath; the experts live in the context, outside the module tree.
    """

    def __init__(self, base: nn.Module, site: str, stack: str, context: RoutingContext):
        super().__init__()
        self.base = base
        self.site = site
        self.stack = stack
        self.__dict__["context"] = context

    def __getattr__(self, name: str) -> Any:
        # Some models look at a layer's weight before they call it (T5 asks wo for its dtype).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        # Under the base's own names, so that save_pretrained writes what from_pretrained reads.
        return self.base.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}base.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.compiler.disable  # it looks at the running batch, so that each layer would be compiled again and again
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        context: RoutingContext = self.__dict__["context"]
        bank = context.bank(self.site)
        if bank is None:
            return y
        x_Td, y_To = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if bank.num_experts == 1 and context.always_on:
            weight = context.gate_weight(self.site, x_Td) if context.gated else None
            return add_single_expert(y_To, x_Td, bank, weight).view_as(y)
        if context.exchanges:
            delta_to = context.shared.delta(self.site, x, partial(context.exchange, self.stack)).to(y.dtype)
            keep = context.stacks.tokens_of(self.stack, x).keep
            return (y_To + delta_to if keep is None else y_To.index_add(0, keep, delta_to)).view_as(y)
        tokens = context.stacks.tokens_of(self.stack, x)
        if (blocks := context.blocks) is not None and blocks.fit(x_Td, bank):
            context.count_assigned(self.site, tokens)
            gates = context.gates[self.site] if context.gated else None
            return add_blocks(y_To, x_Td, bank, blocks, gates).view_as(y)
        route = context.route(self.site, x, tokens, bank)
        context.count(self.site, route.expert_ids, route.ragged)
        route = context.local_ids(route)
        return add_experts(y_To, x_Td, bank, route, tokens.keep).view_as(y)
