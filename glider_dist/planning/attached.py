"""The pool attached to the base on the meta device, and a routed forward (and backward) of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from glider_dist.config import RouterConfig
from glider_dist.lora.bank import SiteBank, padded_rank
from glider_dist.model.attach import detach, install, query_scores
from glider_dist.model.context import RoutingContext
from glider_dist.model.routed import RoutedLinear
from glider_dist.model.shared import SharedInputs
from glider_dist.planning.depth import Measured
from glider_dist.planning.target import META, Target
from glider_dist.routing.strategies import needs_scores, resolved


@contextmanager
def attached(target: Target, router: RouterConfig, dtype: torch.dtype) -> Iterator[RoutingContext]:
    """The whole pool in ``dtype``.

    A rank that holds a part computes as many rows on average: those that others send it, for its own.
    """
    model, names = target.frozen.model, target.experts.names
    shapes = target.sites()
    banks = {site: _bank(target, shape, dtype) for site, shape in shapes.items()}
    gates = {site: torch.empty(len(names), d_in, device=META) for site, (_, d_in) in shapes.items()}
    context = install(model, names, banks, gates)
    try:
        context.use(resolved(router, {})[0])
        yield context
    finally:
        detach(model)


def _bank(target: Target, shape: tuple[int, int], dtype: torch.dtype) -> SiteBank:
    count, rank = len(target.experts.names), target.experts.rank
    d_out, d_in = shape
    return SiteBank(
        torch.empty(count, padded_rank(rank), d_in, dtype=dtype, device=META),
        torch.empty(count, padded_rank(rank), d_out, dtype=dtype, device=META),
        torch.empty(count, device=META),
        torch.ones(count, dtype=torch.bool, device=META),
        (rank,) * count,
    )


def prototypes(context: RoutingContext) -> list[torch.Tensor]:
    """What local scores are made from, once and for all batches."""
    local = context.strategy.local
    if local is None:
        return []
    return [context.prototypes.of(local, site, bank, ()) for site, bank in context.banks.items()]


def measure_routed(target: Target, router: RouterConfig, forward: Callable[[], object], queries: int) -> Measured:
    """A forward over so many queries, of the blocks that the base has now."""
    groups = SharedInputs()
    with attached(target, router, target.base.dtype) as context, _watching(target.frozen.model, groups):
        banks = [tensor for bank in context.banks.values() for tensor in (bank.A, bank.B)]
        known = [*banks, *context.gates.values(), *prototypes(context)]

        def work() -> None:
            with torch.no_grad(), _scores(target, router, queries):
                forward()

        trace = target.trace(work, known)
    groups.finish()
    return Measured(trace.peak, trace.kept, trace.flops, trace.kernels, _shapes_of(target, groups))


def measure_trained(
    target: Target, router: RouterConfig, loss: Callable[[], torch.Tensor], queries: int, owned: int
) -> Measured:
    """A forward and backward through the routers; the places for all gradients are there before.

    Args:
        owned: experts of a rank. Ids reach beyond them, but these tensors have no values to look up.
    """
    groups = SharedInputs()
    wide = torch.promote_types(target.base.dtype, torch.float32)
    joint = target.cfg.joint
    with attached(target, router, wide) as context, _watching(target.frozen.model, groups):
        for bank in context.banks.values():
            bank.A, bank.B, bank.scale = bank.A[:owned].clone(), bank.B[:owned].clone(), bank.scale[:owned]
        experts = [tensor for bank in context.banks.values() for tensor in (bank.A, bank.B)]
        gates = list(context.gates.values())
        trained = [*(experts if joint.train != "gates" else ()), *(gates if joint.train != "experts" else ())]
        for tensor in trained:
            tensor.requires_grad_().grad = torch.empty_like(tensor)
        known = [*experts, *gates, *(tensor.grad for tensor in trained if tensor.grad is not None)]
        if joint.train == "experts":
            known += prototypes(context)

        def work() -> None:
            with _scores(target, router, queries):
                loss().backward()

        trace = target.trace(work, known)
    groups.finish()
    return Measured(trace.peak, trace.kept, trace.flops, trace.kernels, _shapes_of(target, groups))


def _scores(target: Target, router: RouterConfig, queries: int) -> Any:
    if not needs_scores(router):
        return nullcontext()
    return query_scores(target.frozen.model, torch.zeros(queries, len(target.experts.names), device=META))


def _shapes_of(target: Target, groups: SharedInputs) -> Counter[tuple[tuple[int, int], ...]]:
    shapes = target.sites()
    return Counter(tuple(shapes[site] for site in group) for group in groups.groups.values())


@contextmanager
def _watching(model: nn.Module, groups: SharedInputs) -> Iterator[None]:
    """See in the traced forward which sites read one input, as an exchange does."""

    def watch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, RoutedLinear)
        groups.delta(module.site, args[0], lambda sites, x: [x] * len(sites))

    handles = [
        module.register_forward_pre_hook(watch) for module in model.modules() if isinstance(module, RoutedLinear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
