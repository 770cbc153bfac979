"""Plans of ``calibrate`` and ``evaluate``: the pool attached to the base, its experts shared by the mesh."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from glider_dist.config import RouterConfig
from glider_dist.evaluation.evaluate import check_stage
from glider_dist.model.attach import CACHE_BYTES, check_dispatch
from glider_dist.model.batch import target_nll
from glider_dist.model.engine import check_generation
from glider_dist.planning.attached import attached, measure_routed, prototypes
from glider_dist.planning.depth import measured
from glider_dist.planning.report import StagePlan, seconds
from glider_dist.planning.target import Target
from glider_dist.planning.traffic import WAYS, bandwidth, compute_seconds, distinct, exchange, sharded_traffic
from glider_dist.routing.strategies import check_router, needs_scores, strategy_of


def plan_calibrate(target: Target) -> StagePlan:
    """Raises GliderError if the stage cannot run as configured or the device is too small."""
    cfg = target.cfg
    router = dataclasses.replace(cfg.router, kind="glider")
    check_router(router, len(target.experts.names))
    _check_dispatch(target)
    batch = target.collator.batch([target.row()] * cfg.evaluate.batch_size)
    return _plan(target, "calibrate", router, lambda: target_nll(target.frozen.model, batch), 1)


def plan_evaluate(target: Target) -> StagePlan:
    """Raises GliderError if the stage cannot run as configured or the device is too small."""
    cfg, model = target.cfg, target.frozen.model
    check_stage(cfg, len(target.experts.names), target.world)
    routers = [dataclasses.replace(cfg.router, kind=kind) for kind in cfg.evaluate.routers]
    _check_dispatch(target)
    if target.sharded:
        check_generation(target.frozen.nbytes)
    # The one with most scores; one without scores, such as merged experts, costs no more than the base.
    router = max(routers, key=lambda router: (strategy_of(router).static is None, needs_scores(router)))
    if strategy_of(router).static is not None:
        router = dataclasses.replace(router, kind="base")
    inputs: dict[str, Any] = target.collator.prompts([target.row()] * cfg.evaluate.batch_size)
    if target.collator.seq2seq:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :1]
    else:
        inputs |= target.collator.positions(inputs["attention_mask"])
        inputs |= {"logits_to_keep": 1} if target.collator.keeps_logits else {}

    def prefill() -> None:
        kept = model(**inputs, use_cache=True)  # the cache lives as long as the answers grow
        del kept

    return _plan(target, "evaluate", router, prefill, cfg.evaluate.max_new_tokens)


def _check_dispatch(target: Target) -> None:
    if target.expert_parallel > 1:
        check_dispatch(target.cfg.dispatch, target.cfg.router)


def _plan(
    target: Target, stage: str, router: RouterConfig, forward: Callable[[], object], forwards: int
) -> StagePlan:
    cfg, total = target.cfg, len(target.experts.names)
    queries = cfg.evaluate.batch_size
    batch = measured(target.base.model, lambda: measure_routed(target, router, forward, queries))
    with attached(target, router, target.base.dtype) as context:
        gates, made = list(context.gates.values()), prototypes(context)
        one = sum(bank.nbytes() for bank in context.banks.values()) // total
    plan = StagePlan(stage)
    plan.counts = {
        "experts on a rank": str(target.most_owned),
        "queries a batch": f"{cfg.evaluate.batch_size} x {cfg.tasks.max_length}",
    }
    plan.memory = {
        **target.base_bytes(),
        "experts of the pool": target.most_owned * one,
        "gates of all experts": sum(gate.nbytes for gate in gates),
        "prototypes of all experts": sum(tensor.nbytes for tensor in made),
        "activations, logits, keys and values": batch.peak,
        "reserve (estimated)": target.reserve,
    }
    plan.host = {
        **target.loading_bytes(),
        "experts and gates while they load": target.most_owned * one + sum(gate.nbytes for gate in gates),
        "index of descriptions": target.index_bytes(),
    }
    gathered, gathering = sharded_traffic(target, backward=False)
    time = max(compute_seconds(target, batch), gathering)
    plan.estimates = {
        "TFLOP a batch": f"{batch.flops / 1e12:.3g}",
        "kernels it launches": str(batch.kernels),
        "GB from others, the base": f"{gathered / 1e9:.3g}",
    }
    if target.expert_parallel > 1:
        plan.memory["experts fetched, kept"] = min(CACHE_BYTES, (total - target.most_owned) * one)
        time += _add_shared(target, plan, router, batch.groups, one)
    plan.estimates["a batch" if forwards == 1 else "a batch to its first tokens"] = seconds(time)
    plan.check(cfg.plan.device_gb, _ways(target))
    return plan


def _add_shared(
    target: Target, plan: StagePlan, router: RouterConfig, groups: Counter[tuple[tuple[int, int], ...]], one: int
) -> float:
    """Add what ranks that share the experts exchange in a batch; returns its seconds."""
    cfg, total = target.cfg, len(target.experts.names)
    if router.shortlist is not None and cfg.dispatch in ("auto", "local"):
        fetched = distinct(total, router.shortlist, cfg.evaluate.batch_size)
        plan.memory["experts of the shortlists"] = round(fetched * one)
        moved = fetched * one * (1 - target.most_owned / total)
        plan.estimates["GB from others, shortlisted experts"] = f"{moved / 1e9:.3g}"
        return moved / bandwidth(target, target.expert_parallel)
    return add_exchange(target, plan, router, groups, cfg.evaluate.batch_size * cfg.tasks.max_length)


def add_exchange(
    target: Target,
    plan: StagePlan,
    router: RouterConfig,
    groups: Counter[tuple[tuple[int, int], ...]],
    tokens: int,
    trained: bool = False,
) -> float:
    """Add the exchanges of a forward over so many tokens of a rank (and its backward); returns their seconds."""
    cfg = target.cfg
    places = router.top_k if router.top_p is None else router.top_p_max
    moves = [(exchange(target, shapes, tokens, places, trained), times) for shapes, times in groups.items()]
    ways = WAYS if cfg.dispatch == "auto" else (cfg.dispatch,)
    plan.memory["exchange"] = max(move.buffers[way] for move, _ in moves for way in ways)
    for way in WAYS:
        moved = sum(times * move.nbytes[way] for move, times in moves)
        plan.estimates[f"GB to others, {way}"] = f"{moved / 1e9:.3g}"
        plan.estimates[f"exchanges, {way}"] = seconds(sum(times * move.seconds[way] for move, times in moves))
    return sum(times * min(move.seconds[way] for way in ways) for move, times in moves)


def _ways(target: Target) -> list[str]:
    ways = [f"cut evaluate.batch_size to {max(1, target.cfg.evaluate.batch_size // 2)}"]
    if not target.sharded and target.world > 1:
        ways.append("shard the base (zero_stage=3)")
    if target.expert_parallel < target.world:
        ways.append("share the experts among more ranks (mesh.expert_parallel)")
    return ways
