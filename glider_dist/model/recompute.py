"""Activation checkpointing over a frozen base, without the training mode that would turn its dropout on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from glider_dist.errors import GliderError


@contextlib.contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Recompute each block's activations in the backward instead of keeping them.

    The backward must run inside the batch's own context (scores, assigned experts), so that the layers route
    alike when they run again. transformers' own switch works in training mode only.

    Raises:
        GliderError: if the model's blocks are not marked for checkpointing.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise GliderError("train.gradient_checkpointing: this model has no blocks to recompute; turn it off")
    for block in blocks:
        block.forward = _checkpointed(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
