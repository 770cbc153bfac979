"""Attach a pool to a model the user has loaded, steer it per batch, and detach it without a trace."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.lora.bank import SiteBank, stack_site
from glider_dist.model.context import RoutingContext
from glider_dist.model.routed import RoutedLinear
from glider_dist.model.sites import device_of, fingerprint, linear_sites
from glider_dist.model.stored import cached_arrow_prototypes, read_activations
from glider_dist.pool import ExpertPool
from glider_dist.pool.files import read_json
from glider_dist.pool.fingerprint import check_gate, check_sites
from glider_dist.routing.strategies import check_router, resolved

log = logging.getLogger(__name__)
_CONTEXT = "_glider_context"


def attach_pool(
    model: nn.Module,
    pool: ExpertPool,
    router: RouterConfig | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Route a Hugging Face model through the experts of a pool; the model itself is changed and returned.

    Args:
        model: any causal or encoder-decoder model, already on its device.
        pool: the experts; all of them are loaded to the model's device.
        router: strategy and its settings; None is GLIDER. Settings left at None take the pool's calibration.
        dtype: dtype of the experts; None takes the model's.

    Raises:
        GliderError: the pool was made for another base, is empty, lacks gates that the router needs, adapts a
            layer that the model lacks or with another shape, or the model already has a pool.
    """
    if _CONTEXT in model.__dict__:
        raise GliderError("this model already has a pool; call glider_dist.detach(model) first")
    if not pool.names:
        raise GliderError(f"pool {pool.path} holds no experts")
    router = router or RouterConfig()
    strategy = check_router(router, len(pool))
    missing = pool.missing_gates()
    if strategy.local == "gate" and missing:
        raise GliderError(
            f"pool {pool.path}: expert {missing[0]!r} has no gate ({len(missing)} of {len(pool)} lack one); "
            f"run train-gates, or choose a router without gates such as router.kind=arrow"
        )
    pool.check_base(fingerprint(model))
    device = device_of(model)
    banks, gates = load_banks(model, pool, dtype or _float_dtype(model), with_gates=not missing)
    banks = {site: bank.to(device, bank.A.dtype) for site, bank in banks.items()}
    gates = {site: gate.to(device) for site, gate in gates.items()}
    context = install(model, pool.names, banks, gates)
    context.prototypes.stored = {
        "arrow": partial(cached_arrow_prototypes, pool, banks),
        "activation": partial(read_activations, pool, banks),
    }
    try:
        set_router(model, router, pool)
    except GliderError:
        detach(model)
        raise
    return model


def load_banks(
    model: nn.Module, pool: ExpertPool, dtype: torch.dtype, with_gates: bool
) -> tuple[dict[str, SiteBank], dict[str, torch.Tensor]]:
    """Read every expert and stack it per site, on the CPU.

    Returns:
        ``{site: SiteBank}`` in ``dtype``, and ``{site: [E, d_in]}`` fp32 raw gates (zeros where an expert does
        not adapt the site); gates are empty unless ``with_gates``.
    """
    known = {name: site.shape for name, site in linear_sites(model).items()}
    weights, gates = [], []
    for expert in pool.experts():
        loras = expert.weights()
        shapes = {site: (lora.B.shape[0], lora.A.shape[1]) for site, lora in loras.items()}
        check_sites(expert.name, shapes, known)
        weights.append(loras)
        if with_gates:
            gate = expert.gate()
            check_gate(expert.name, gate, shapes)
            gates.append(gate)
    used = [site for site in known if any(site in loras for loras in weights)]
    banks = {site: stack_site([loras.get(site) for loras in weights], known[site], dtype) for site in used}
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    stacked = {}
    for site in used if with_gates else ():
        zero = torch.zeros(known[site][1])
        stacked[site] = torch.stack([gate.get(site, zero) for gate in gates]).to(gate_dtype)
    return banks, stacked


def install(
    model: nn.Module, names: tuple[str, ...], banks: dict[str, SiteBank], gates: dict[str, torch.Tensor]
) -> RoutingContext:
    """Wrap the sites of ``banks`` and hang their context on the model."""
    context = RoutingContext(model, names, banks, gates)
    sites = linear_sites(model)
    for name in banks:
        parent, _, leaf = name.rpartition(".")
        module = sites[name].module
        routed = RoutedLinear(module, name, context.stacks.stack_of(module), context)
        setattr(model.get_submodule(parent), leaf, routed)
    model.__dict__[_CONTEXT] = context
    return context


def context_of(model: nn.Module) -> RoutingContext:
    """Raises GliderError if the model has no pool."""
    context = model.__dict__.get(_CONTEXT)
    if context is None:
        raise GliderError("this model has no pool; call glider_dist.attach_pool(model, pool) first")
    return context


def set_router(model: nn.Module, router: RouterConfig, pool: ExpertPool | None = None) -> None:
    """Switch the router of an attached model; its experts stay loaded."""
    path = pool.router_dir / "calibration.json" if pool is not None else None
    calibration: dict[str, Any] = read_json(path) if path is not None and path.exists() else {}
    full, guessed = resolved(router, calibration)
    context = context_of(model)
    context.use(full)
    if guessed and context.strategy.uses_global:
        log.warning(
            "the pool has no calibration: alpha_in=%s, alpha_out=%s, threshold=%s stand in (run calibrate)",
            full.alpha_in, full.alpha_out, full.threshold,
        )  # fmt: skip


def detach(model: nn.Module) -> nn.Module:
    """Give back the untouched base: the same module objects in the same places."""
    context = context_of(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, RoutedLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.base)
    context.stacks.remove()
    del model.__dict__[_CONTEXT]
    return model


@contextlib.contextmanager
def query_scores(model: nn.Module, similarity: torch.Tensor) -> Iterator[None]:
    """Set the cosines between each query of the batch and each expert's description.

    Args:
        similarity: ``[batch, E]``; -inf excludes an expert for a query. In generation with beams, one row per
            query, not per beam.
    """
    context = context_of(model)
    with context.scores(similarity.to(device_of(model))):
        yield


@contextlib.contextmanager
def assign_experts(model: nn.Module, expert_ids: torch.Tensor) -> Iterator[None]:
    """Serve each query of the batch by one given expert alone (the oracle, and expert training).

    Args:
        expert_ids: ``[batch]`` int64, positions in ``pool.names``.

    Raises:
        GliderError: if there is no such expert.
    """
    context = context_of(model)
    if any(not 0 <= index < len(context.names) for index in expert_ids.tolist()):
        raise GliderError(f"expert ids must lie in [0, {len(context.names)}), but are {expert_ids.tolist()}")
    with context.assigned(expert_ids.to(device_of(model))):
        yield


def routing_stats(model: nn.Module) -> dict[str, torch.Tensor]:
    """``{site: [E] int64}`` tokens each expert served since the last reset, padding excluded."""
    return {site: counts.cpu() for site, counts in context_of(model).counts.items()}


def reset_routing_stats(model: nn.Module) -> None:
    context_of(model).counts.clear()


def _float_dtype(model: nn.Module) -> torch.dtype:
    # Of a quantised base only the norms and embeddings have the compute dtype.
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
