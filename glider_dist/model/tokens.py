"""Which entries of a layer's input are real tokens, and which query each belongs to.

Hooks on the model's stacks (a causal model has one, an encoder-decoder two) read the masks at the start of each
forward; the layers look them up. This covers left and right padding, cached decoding (the mask's last columns
are the new tokens), cross-attention (keys and values come from the encoder's tokens) and beams.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from glider_dist.errors import GliderError
from glider_dist.model.sites import language_model


@dataclass(frozen=True)
class Tokens:
    """The tokens of one stack in one forward, over a flattened ``[B, S]`` input.

    Attributes:
        batch: B.
        length: S.
        keep: ``[T]`` int64 positions of the real tokens in ``B * S``, or None if all are real.
        row: ``[T]`` int64, the batch row of each real token.
    """

    batch: int
    length: int
    keep: torch.Tensor | None
    row: torch.Tensor

    def query_of(self, queries: int) -> torch.Tensor:
        """``[T]`` the query of each token; generation repeats each query once per beam.

        Raises:
            GliderError: the rows are no multiple of the queries.
        """
        if self.batch == queries or not len(self.row):
            return self.row
        if queries == 0 or self.batch % queries:
            raise GliderError(f"scores were given for {queries} queries, but the batch has {self.batch} rows")
        return self.row // (self.batch // queries)


def find_tokens(batch: int, length: int, mask: torch.Tensor | None, device: torch.device) -> Tokens:
    """Read a 2-D mask ``[B, >= S]``, whose last S columns belong to the input; other masks mean no padding.

    Costs one host sync where there is a mask (the number of real tokens).
    """
    row = torch.arange(batch * length, device=device) // length
    if mask is None or mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        return Tokens(batch, length, None, row)
    keep = mask[:, mask.shape[1] - length :].reshape(-1).nonzero().squeeze(1)
    if keep.shape[0] == batch * length:
        return Tokens(batch, length, None, row)
    return Tokens(batch, length, keep, row[keep])


def padding_mask(mask: Any) -> torch.Tensor | None:
    """``[B, >= S]``, nonzero for real tokens, from any mask that a stack is handed; None if it has no padding.

    Under a static cache, and inside multimodal models, that is a mask ``[B, 1, S, keys]`` (bool, or 0 where a key
    may be read), or a dict of them by the layers' kind of attention.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        return mask if isinstance(mask, torch.Tensor) else None
    allowed = mask == 0 if mask.is_floating_point() else mask.bool()
    # A token reads itself and nothing reads padding. Which key is its own is known without a cache alone; the
    # padding of a prompt that goes to one is on the left, where it has nothing to read.
    square = mask.shape[2] == mask.shape[3]
    return (allowed.diagonal(dim1=2, dim2=3) if square else allowed.any(-1)).any(1)


class Stacks:
    """Watches the forward of each stack and remembers its tokens until the next one.

    Args:
        done: called when a stack's forward has ended.

    Attributes:
        idle: take all tokens for padding: the forward serves other ranks alone (:func:`glider_dist.generate`).
    """

    def __init__(self, model: nn.Module, done: Callable[[], None]):
        self.idle = False
        self.tokens: dict[str, Tokens] = {}
        self.cross: tuple[torch.Tensor, Any, Tokens] | None = None
        self.handles: list[Any] = []
        config: Any = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            self.modules = {"encoder": model.get_encoder(), "decoder": model.get_decoder()}  # type: ignore[operator]
        else:
            self.modules = {"decoder": language_model(model)}
        # The first stack that holds a module: an encoder's are no part of the decoder's.
        self.stack_of_module = {
            inner: name for name, stack in reversed(self.modules.items()) for inner in stack.modules()
        }
        for name, module in self.modules.items():
            signature = inspect.signature(module.forward)

            def watch(_: nn.Module, args: Any, kwargs: Any, name: str = name, signature: Any = signature) -> None:
                self._observe(name, signature.bind_partial(*args, **kwargs).arguments)

            self.handles.append(module.register_forward_pre_hook(watch, with_kwargs=True))
            self.handles.append(module.register_forward_hook(lambda *_: done(), always_call=True))

    def stack_of(self, site: nn.Module) -> str:
        """The name of the stack that holds this module."""
        # Else the encoder, where there is one: the layer may project its states to the decoder's width.
        return self.stack_of_module.get(site) or next(iter(self.modules))

    def _observe(self, name: str, arguments: dict[str, Any]) -> None:
        arguments = {**arguments.get("kwargs", {}), **arguments}
        inputs = arguments.get("input_ids")
        if inputs is None:
            inputs = arguments.get("inputs_embeds")
        if inputs is None:
            return
        batch, length = inputs.shape[:2]
        mask = padding_mask(arguments.get("attention_mask"))
        self.tokens[name] = self._find(batch, length, mask, inputs.device)
        states = arguments.get("encoder_hidden_states")
        if name != "decoder" or not isinstance(states, torch.Tensor):
            return
        states_mask = arguments.get("encoder_attention_mask")
        states_mask = states_mask if isinstance(states_mask, torch.Tensor) else None
        # Every decoding step passes the same states and mask again.
        if self.cross is None or self.cross[0] is not states or self.cross[1] is not states_mask:
            tokens = self._find(states.shape[0], states.shape[1], states_mask, states.device)
            self.cross = (states, states_mask, tokens)

    def _find(self, batch: int, length: int, mask: torch.Tensor | None, device: torch.device) -> Tokens:
        if self.idle:
            none = torch.zeros(0, dtype=torch.int64, device=device)
            return Tokens(batch, length, none, none)
        return find_tokens(batch, length, mask, device)

    def tokens_of(self, stack: str, x: torch.Tensor) -> Tokens:
        """The tokens of a layer's input ``[B, S, d]`` (or ``[B * S, d]``).

        Raises:
            GliderError: if the input has another shape than its stack's.
        """
        if self.cross is not None and stack == "decoder" and _same_memory(x, self.cross[0]):
            return self.cross[2]
        tokens = self.tokens.get(stack)
        if tokens is None:
            raise GliderError(
                "a routed layer ran outside the model's forward; call the model, not one of its layers"
            )
        rows = tokens.batch, tokens.length
        # Rows and columns in another order (XLNet, Longformer) have as many entries, of other tokens.
        if x.numel() // x.shape[-1] != tokens.batch * tokens.length or (x.ndim == 3 and x.shape[:2] != rows):
            if x.shape[0] == tokens.batch:  # a part of each row, such as its first token in BERT's pooler
                return self._find(x.shape[0], x[0].numel() // x.shape[-1], None, x.device)
            raise GliderError(
                f"a routed layer got input {list(x.shape)}, "
                f"but its stack has {tokens.batch} rows of {tokens.length}"
            )
        return tokens

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.tokens, self.cross, self.stack_of_module = [], {}, None, {}


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.data_ptr() == b.data_ptr() and a.numel() > 0)
