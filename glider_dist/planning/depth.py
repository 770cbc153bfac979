"""Trace a few of a model's equal blocks instead of all: what each further block adds is the same."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import nn

_LOW = 2  # the first block may do more than the others, such as T5's position bias


@dataclass
class Measured:
    """Of one forward (and backward).

    Attributes:
        peak: bytes alive at once at most.
        kept: bytes alive when the model's forward returns: for the backward, or keys and values.
        flops: floating-point operations.
        kernels: operations that a GPU would launch.
        groups: sites that read one input, by their shapes ``(d_out, d_in)``: how many such groups there are.
    """

    peak: int
    kept: int
    flops: int
    kernels: int
    groups: Counter[tuple[tuple[int, int], ...]] = field(default_factory=Counter)


def measured(model: nn.Module, run: Callable[[], Measured]) -> Measured:
    """What ``run`` would measure of the whole model.

    If its stacks have the same number of blocks, and all blocks of a stack the same shapes, ``run`` sees two and
    then three of them, and the rest follows: nothing grows faster with the number of blocks than what they keep,
    so that a peak which grows as fast will go on to. One that grows slower (it was in another place, which more
    blocks may surpass) is measured with all blocks.
    """
    stacks = _stacks(model)
    depths = {len(stack) for stack in stacks}
    if len(depths) != 1 or max(depths) <= _LOW + 1:
        return run()
    with _shallow(stacks, _LOW):
        low = run()
    with _shallow(stacks, _LOW + 1):
        high = run()
    if high.peak - low.peak != high.kept - low.kept:
        return run()
    more = max(depths) - _LOW
    groups = Counter({key: low.groups[key] + more * (high.groups[key] - low.groups[key]) for key in high.groups})
    pairs = ((low.peak, high.peak), (low.kept, high.kept), (low.flops, high.flops), (low.kernels, high.kernels))
    peak, kept, flops, kernels = (few + more * (one_more - few) for few, one_more in pairs)
    return Measured(peak, kept, flops, kernels, groups)


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of blocks that have sites inside; none if a list has blocks of several kinds."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found[name] = module
    kinds = [{_kind(block) for block in stack} for stack in found.values()]
    return list(found.values()) if all(len(kind) == 1 for kind in kinds) else []


def _kind(block: nn.Module) -> tuple[object, ...]:
    # T5's first block alone has the position bias of all.
    shapes = [
        (name, tuple(parameter.shape))
        for name, parameter in block.named_parameters()
        if "relative_attention_bias" not in name
    ]
    return type(block), *shapes


@contextlib.contextmanager
def _shallow(stacks: list[nn.ModuleList], depth: int) -> Iterator[None]:
    whole = [dict(stack._modules) for stack in stacks]
    for stack in stacks:
        for name in list(stack._modules)[depth:]:
            del stack._modules[name]
    try:
        yield
    finally:
        for stack, modules in zip(stacks, whole, strict=True):
            stack._modules.update(modules)
