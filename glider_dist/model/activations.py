"""Mean inputs of the routed layers over an expert's own examples: the prototypes of ``average_activation``.

PHATGOOSE's baseline (2402.05859): the tokens are those the expert itself sees, so it serves the whole batch; its
mean input at each site is then compared like a gate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from glider_dist.errors import GliderError
from glider_dist.model.attach import assign_experts, context_of
from glider_dist.model.routed import RoutedLinear, routed_layers


@torch.no_grad()
def average_activations(
    model: nn.Module, batches: Iterable[dict[str, Any]], expert: int
) -> dict[str, torch.Tensor]:
    """The mean input of every site that the expert adapts, over all real tokens of all batches.

    Args:
        model: an attached model.
        batches: keyword arguments of the model's forward; padding is what its masks say.
        expert: the expert that serves them, by its position in the pool.

    Returns:
        ``{site: [d_in]}`` fp32 on the CPU.

    Raises:
        GliderError: if a site saw no token.
    """
    context = context_of(model)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, RoutedLinear)
        x = args[0]
        keep = context.stacks.tokens_of(module.stack, x).keep
        x_Td = x.reshape(-1, x.shape[-1])
        x_Td = x_Td if keep is None else x_Td[keep]
        sums[module.site] = sums.get(module.site, 0) + x_Td.double().sum(0)
        counts[module.site] = counts.get(module.site, 0) + x_Td.shape[0]

    layers = routed_layers(model)
    sites = [site for site in layers if context.banks[site].ranks[expert]]
    handles = [layers[site].register_forward_pre_hook(watch) for site in sites]
    try:
        for inputs in batches:
            with assign_experts(model, torch.tensor([expert])):
                model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    for site in sites:
        if not counts.get(site):
            raise GliderError(
                f"no example of expert {context.names[expert]!r} reached {site}; give it examples that do"
            )
    return {site: (sums[site] / counts[site]).float().cpu() for site in sites}
