"""Generation over experts that live on several ranks, which must run their forwards together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from glider_dist.errors import GliderError
from glider_dist.model.attach import context_of
from glider_dist.model.context import RoutingContext

_PROMPTS = ("input_ids", "inputs_embeds", "inputs")


def generate(model: nn.Module, **inputs: Any) -> Any:
    """``model.generate(**inputs)`` that all ranks call at the same time, each with prompts of its own.

    Ranks may have other numbers of prompts, lengths and numbers of new tokens, or none at all (a batch of 0 rows):
    a rank that is done goes on with forwards that serve the others, but routes and counts none of its own tokens.
    Where nothing is exchanged (one process, or shortlists that were fetched), ranks do not wait for each other,
    unless ``synced_gpus=True`` asks for it (a base under ZeRO 3).

    Args:
        inputs: what ``generate`` of transformers takes, by name; the prompts are ``input_ids`` (or ``inputs``)
            ``[rows, length]`` int64, or ``inputs_embeds`` ``[rows, length, width]``.

    Returns:
        What ``generate`` of transformers returns, by default ``[rows, length]`` int64; 0 rows for 0 prompts.

    Raises:
        GliderError: the model has no pool, no prompts are given (0 rows are some), the router needs similarities
            or experts that are not set (:func:`glider_dist.query_scores`, :func:`glider_dist.assign_experts`),
            or another rank has left.
    """
    base: Any = model
    context = context_of(model)
    asked = inputs.pop("synced_gpus", None)
    synced = True if context.exchanges else asked
    given = [inputs[name] for name in _PROMPTS if inputs.get(name) is not None]
    if not given:
        raise GliderError(f"generate needs prompts: give one of {', '.join(_PROMPTS)}, 0 rows if there are none")
    prompts = given[0]
    if len(prompts):
        with _idle_when_done(base, context):
            return base.generate(**inputs, synced_gpus=synced)
    if not synced:
        return prompts.new_zeros(0, prompts.shape[1], dtype=torch.int64)
    # transformers cannot generate for no prompt: a row of one token stands in, which no expert sees.
    stand_in = {name: _one_row(value) for name, value in inputs.items()}
    stand_in.update(max_new_tokens=1, min_new_tokens=None, max_length=None, min_length=0)
    context.stacks.idle = True
    try:
        found = base.generate(**stand_in, synced_gpus=True)
    finally:
        context.stacks.idle = False
    if isinstance(found, torch.Tensor):
        return found[:0]
    return type(found)(sequences=found.sequences[:0])


@contextlib.contextmanager
def _idle_when_done(base: Any, context: RoutingContext) -> Iterator[None]:
    """transformers asks before each forward whether any rank has work left, and tells whether this one has."""
    ask = base._has_unfinished_sequences

    def watch(this_peer_finished: bool, *args: Any, **kwargs: Any) -> bool:
        context.stacks.idle = bool(this_peer_finished)
        return bool(ask(this_peer_finished, *args, **kwargs))

    base._has_unfinished_sequences = watch
    try:
        yield
    finally:
        del base._has_unfinished_sequences
        context.stacks.idle = False


def _one_row(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    return torch.ones(1, max(1, value.shape[1]), *value.shape[2:], dtype=value.dtype, device=value.device)
