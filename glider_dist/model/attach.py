"""Attach a pool to a model the user has loaded, steer it per batch, and detach it without a trace."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.lora.bank import SiteBank
from glider_dist.model.context import RoutingContext
from glider_dist.model.loading import load_banks, load_part
from glider_dist.model.routed import RoutedLinear, routed_layers
from glider_dist.model.sites import check_bare, device_of, every_linear, fingerprint, linear_sites
from glider_dist.model.stored import cached_arrow_prototypes, read_activations, weights_hashes
from glider_dist.parallel.cost import Costs
from glider_dist.parallel.dispatch import DISPATCHES, Dispatch
from glider_dist.parallel.guards import check_replicas, check_same_pool
from glider_dist.parallel.mesh import Mesh, gather_rows
from glider_dist.parallel.placement import Placement, contiguous
from glider_dist.parallel.probe import measure_costs
from glider_dist.pool import ExpertPool
from glider_dist.pool.calibration import read_calibration
from glider_dist.routing.strategies import check_router, local_scores, resolved, strategy_of

log = logging.getLogger(__name__)
_CONTEXT = "_glider_context"
CACHE_BYTES = 1 << 30


@torch.inference_mode(False)  # else only forwards in inference mode could use what is loaded here
def attach_pool(
    model: nn.Module,
    pool: ExpertPool,
    router: RouterConfig | None = None,
    mesh: Mesh | None = None,
    dispatch: str = "auto",
    dtype: torch.dtype | None = None,
    placement: Placement | None = None,
    costs: Costs | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> nn.Module:
    """Route a Hugging Face model through the experts of a pool; the model itself is changed and returned.

    With gradient checkpointing, each backward must come before the next forward and inside its ``query_scores``:
    recomputed layers route by the model's latest mask and scores.

    Args:
        model: any causal or encoder-decoder model, already on its device.
        pool: the experts; those that this rank owns (all of them without a mesh) are loaded to the model's device.
        router: strategy and its settings; None is GLIDER. Settings left at None take the pool's calibration.
        mesh: from :func:`glider_dist.init_mesh`; its expert-parallel groups share the experts, and their ranks
            must then run the same number of forwards. None or an expert-parallel size of 1: this rank holds all.
        dispatch: ``all_to_all`` (tokens travel), ``gather`` (experts travel), ``auto`` (the cheaper one at each
            exchange), or ``local`` (this rank holds all experts, or ``router.shortlist`` bounds what it fetches).
        dtype: dtype of the experts; None takes the model's.
        placement: which rank owns which expert; None is equal shares in the pool's order.
        costs: constants for ``auto``; None measures them (about a second).
        cache_bytes: frozen experts of other ranks that are kept, at most.

    Raises:
        GliderError: the pool was made for another base, is empty or damaged, lacks gates that the router needs,
            adapts a layer that the model lacks or with another shape, adapts no layer that tokens pass, or the
            model already has a pool; ``dispatch`` is unknown or cannot reach the experts, or the router is refused
            as by :func:`set_router`. With a mesh also: a rank sees another pool or placement than rank 0, replicas
            differ, a rank cannot read its experts, or the placement is for another number of ranks. The model
            is then as it was.
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
    if dispatch not in DISPATCHES:
        raise GliderError(f"dispatch={dispatch!r} is unknown; choose one of {', '.join(DISPATCHES)}")
    check_bare(model)
    pool.check_base(fingerprint(model))
    device = device_of(model)
    dtype = dtype or _float_dtype(model)
    if mesh is None or mesh.expert_parallel == 1:
        hashes = weights_hashes(pool)
        banks, gates = load_banks(model, pool, dtype, with_gates=not missing)
        banks = {site: bank.to(device, dtype) for site, bank in banks.items()}
        gates = {site: gate.to(device) for site, gate in gates.items()}
        context = install(model, pool.names, banks, gates)
        context.prototypes.stored = {
            "arrow": partial(cached_arrow_prototypes, pool.router_dir, hashes, banks),
            "activation": partial(read_activations, pool, hashes, {s: banks[s] for s in routed_layers(model)}),
        }
    else:
        check_dispatch(dispatch, router)
        placed = placement or contiguous(pool.names, mesh.expert_parallel)
        context = _install_part(
            model, pool, dtype, device, mesh, placed, dispatch, costs, cache_bytes, not missing
        )
    context.pool = pool
    try:
        if not routed_layers(model):
            raise GliderError(
                f"no layer that pool {pool.path} adapts is one of the {len(linear_sites(model))} linear layers of "
                f"this {type(model).__name__} that tokens pass (with in_features and out_features), so that "
                "no expert could act"
            )
        set_router(model, router)
    except GliderError:
        detach(model)
        raise
    return model


def check_dispatch(dispatch: str, router: RouterConfig) -> None:
    """Raises GliderError unless ranks that share the experts can meet them this way."""
    if dispatch == "local" and router.shortlist is None:
        raise GliderError(
            "dispatch=local needs every expert on each rank: use mesh.expert_parallel=1, or bound with "
            "router.shortlist what is fetched"
        )


def install(
    model: nn.Module,
    names: tuple[str, ...],
    banks: dict[str, SiteBank],
    gates: dict[str, torch.Tensor],
    dispatch: Dispatch | None = None,
    eligible: dict[str, torch.Tensor] | None = None,
) -> RoutingContext:
    """Wrap the sites of ``banks`` that tokens pass, and hang their context on the model.

    Args:
        dispatch: how to reach the experts of other ranks; None if ``banks`` hold all of ``names``.
        eligible: ``{site: [E] bool}`` which of all experts adapt the site; by default what the banks say.
    """
    context = RoutingContext(model, names, banks, gates, dispatch, eligible)
    known, passed = every_linear(model), linear_sites(model)
    away = [name for name in banks if name not in passed]
    if away:
        log.warning(
            "%d of the %d layers that the experts adapt lie outside the language model, such as %s: what they "
            "compute belongs to no query, so that the base alone serves there", len(away), len(banks), away[0],
        )  # fmt: skip
    for name in banks:
        parent, _, leaf = name.rpartition(".")
        module = known[name].module
        if name in passed:
            routed = RoutedLinear(module, name, context.stacks.stack_of(module), context)
            setattr(model.get_submodule(parent), leaf, routed)
    model.__dict__[_CONTEXT] = context
    return context


def _install_part(
    model: nn.Module,
    pool: ExpertPool,
    dtype: torch.dtype,
    device: torch.device,
    mesh: Mesh,
    placement: Placement,
    dispatch: str,
    costs: Costs | None,
    cache_bytes: int,
    with_gates: bool,
) -> RoutingContext:
    """Load the experts that this rank owns, and install the way to the others."""
    check_same_pool(mesh, pool, placement)
    hashes = weights_hashes(pool, placement.owned(mesh.expert_rank))
    part = load_part(model, pool, dtype, with_gates, mesh, placement)
    banks = {site: bank.to(device, dtype) for site, bank in part.banks.items()}
    check_replicas(mesh, placement, banks)
    way = "auto" if dispatch == "local" else dispatch
    if costs is None and way == "auto" and not torch.are_deterministic_algorithms_enabled():
        costs = measure_costs(mesh, device, dtype)
    scales = {site: scale.to(device) for site, scale in part.scales.items()}
    made = Dispatch(mesh, placement, way, scales, device, costs, cache_bytes)
    gates = {site: gate.to(device) for site, gate in part.gates.items()}
    eligible = {site: mask.to(device) for site, mask in part.eligible.items()}
    context = install(model, pool.names, banks, gates, made, eligible)
    arrow = partial(cached_arrow_prototypes, pool.router_dir, hashes, banks)
    context.prototypes.stored = {"arrow": lambda: gather_rows(arrow(), mesh, placement)}
    return context


def context_of(model: nn.Module) -> RoutingContext:
    """Raises GliderError if the model has no pool."""
    context = model.__dict__.get(_CONTEXT)
    if context is None:
        raise GliderError("this model has no pool; call glider_dist.attach_pool(model, pool) first")
    return context


def shares_experts(model: nn.Module) -> bool:
    """Whether each rank holds a part of the attached experts, so that a forward is a collective."""
    context = model.__dict__.get(_CONTEXT)
    return context is not None and context.dispatch is not None


def set_router(model: nn.Module, router: RouterConfig, pool: ExpertPool | None = None) -> None:
    """Switch the router of an attached model; its experts stay loaded. Ranks that share the experts call it
    together. Scores set by a ``query_scores`` around it are forgotten.

    Args:
        router: settings left at None take the calibration of the pool that was attached, and published defaults
            where that has none (with a warning).
        pool: whose calibration is taken instead.

    Raises:
        GliderError: the model has no pool, the calibration cannot be read, the strategy is unknown, asks for more
            experts than there are, needs what the pool lacks (gates, average activations, an expert named in
            ``router.general``, one LoRA rank for what is merged or general) or, where ranks share the experts, all
            of them on each rank. The router of before stays.
    """
    context = context_of(model)
    uses, pool = strategy_of(router).uses_global, pool or context.pool
    stored = {}
    if uses and pool is not None and None in (router.alpha_in, router.alpha_out, router.threshold):
        stored = read_calibration(pool, local_scores(router))
    full, guessed = resolved(router, stored)
    context.use(full)
    if guessed and uses:
        log.warning(
            "the pool has no calibration: alpha_in=%s, alpha_out=%s, threshold=%s stand in (run calibrate)",
            full.alpha_in, full.alpha_out, full.threshold,
        )  # fmt: skip


def detach(model: nn.Module) -> nn.Module:
    """Give back the untouched base, which is also returned: the same module objects in the same places.

    Raises:
        GliderError: the model has no pool.
    """
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
    """Set the cosines between each query of the batch and each expert's description, for the forwards inside.

    Args:
        similarity: ``[batch, E]`` floating-point, on any device; half precision is read as fp32. -inf excludes an
            expert for a query. In generation with beams, one row per query, not per beam.

    Raises:
        GliderError: the model has no pool, there are not E columns, or a number is NaN or infinite (looked at only
            in the CPU's memory); in the forward, the batch's rows are no multiple of the queries.
    """
    context = context_of(model)
    similarity = torch.as_tensor(similarity)
    if similarity.device.type == "cpu" and not bool((similarity < math.inf).all()):
        raise GliderError("similarity holds NaN or infinity; only -inf, which excludes an expert, has a meaning")
    with context.scores(similarity.to(device_of(model), non_blocking=True)):
        yield


@contextlib.contextmanager
def assign_experts(model: nn.Module, expert_ids: torch.Tensor) -> Iterator[None]:
    """Serve each query of the batch by one given expert alone (the oracle, and expert training).

    Args:
        expert_ids: ``[batch]`` int64, positions in ``pool.names``.

    Raises:
        GliderError: the model has no pool, or there is no such expert; in the forward, the batch's rows are no
            multiple of the queries.
    """
    context = context_of(model)
    expert_ids = torch.as_tensor(expert_ids)
    if expert_ids.ndim != 1 or expert_ids.is_floating_point():
        raise GliderError(f"expert_ids must be int64 [batch], but are {expert_ids.dtype} {list(expert_ids.shape)}")
    experts = expert_ids.tolist()
    if any(not 0 <= index < len(context.names) for index in experts):
        raise GliderError(f"expert ids must lie in [0, {len(context.names)}), but are {experts}")
    with context.assigned(experts, device_of(model)):
        yield


def routing_stats(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tokens that each expert served since the last reset, padding excluded.

    Returns:
        ``{site: [E]}`` int64 on the CPU, E all experts of the pool. Where ranks share them each counts its own
        tokens, whoever served them. Sites where nothing was routed are missing: all of them under ``base`` and
        the merged routers.

    Raises:
        GliderError: the model has no pool.
    """
    return {site: counts.to("cpu", copy=True) for site, counts in context_of(model).counts.items()}


def reset_routing_stats(model: nn.Module) -> None:
    """Count from zero again; raises GliderError if the model has no pool."""
    context_of(model).counts.clear()


def _float_dtype(model: nn.Module) -> torch.dtype:
    # Of a quantised base only the norms and embeddings have the compute dtype.
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
