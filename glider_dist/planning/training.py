"""Plans of ``train-experts`` and ``train-gates``: each rank trains the experts of its own tasks."""

from __future__ import annotations

import torch

from glider_dist.model.batch import Encoded
from glider_dist.parallel.replicas import check_replica_count
from glider_dist.planning.depth import Measured, measured
from glider_dist.planning.report import StagePlan, seconds
from glider_dist.planning.target import META, Target
from glider_dist.planning.traffic import compute_seconds, sharded_traffic
from glider_dist.pool.adapter import SiteLora
from glider_dist.training.adamw import StackedAdamW
from glider_dist.training.batches import MicroBatch, micro_batches, packing_for, slots_for
from glider_dist.training.order import replicas_for, share_out
from glider_dist.training.runner import Runner, installed
from glider_dist.training.slots import ExpertSlots, GateSlots, Slots
from glider_dist.training.trainee import Recipe


def plan_experts(target: Target) -> StagePlan:
    """Raises GliderError if the device is too small."""
    return _plan(target, "train-experts", gate=False)


def plan_gates(target: Target) -> StagePlan:
    """Raises GliderError if the device is too small."""
    return _plan(target, "train-gates", gate=True)


def _plan(target: Target, stage: str, gate: bool) -> StagePlan:
    cfg, train = target.cfg, target.cfg.train
    recipe = Recipe.of(train, cfg.seed, gate)
    # As all experts are taken to have the longest examples, the first rank has as much to do as any.
    costs = [1.0] * len(target.experts.names)
    check_replica_count(train.replicas or 1, target.world)
    replicas = train.replicas or replicas_for(costs, target.world, recipe.batch_size)
    mine = len(share_out(costs, target.world // replicas)[0])
    count = slots_for(target.device, train.experts_in_flight, mine)
    slots = _slots(target, target.shapes, count, gate)
    optimizer = StackedAdamW(slots.weights)
    packing = packing_for(target.device, target.base.model, train.micro_batch_tokens, train.micro_batch_size)
    rows: list[Encoded] = [target.row()] * -(-recipe.batch_size // replicas)
    micros = micro_batches(dict.fromkeys(range(count), rows), packing)
    largest = max(micros, key=lambda micro: (len(micro.items), micro.hi - micro.lo))
    moved_moments = train.moments == "host"
    step = measured(target.base.model, lambda: _measure(target, largest, count, gate))
    plan = StagePlan(stage)
    idle = max(0, target.world - replicas * len(target.experts.names))
    turns = -(-mine // count) * recipe.steps
    plan.counts = {
        "experts on a rank": f"{mine}" + (f" ({idle} ranks have none)" if idle else ""),
        "at a time": str(count),
        "ranks that train each": str(replicas),
        "steps, examples a step": f"{recipe.steps} x {recipe.batch_size}",
        "forwards a step": f"{len(micros)} of {len(largest.items)} x {cfg.tasks.max_length}",
    }
    plan.memory = {
        **target.base_bytes(),
        "experts, gates, their gradients": count * slots.bytes_per_expert,
        "AdamW moments": (1 if moved_moments else count) * optimizer.bytes_per_expert,
        "activations, logits": step.peak,
        "reserve (estimated)": target.reserve,
    }
    best = count * slots.weights.nbytes // len(slots.names)
    plan.host = {**target.loading_bytes(), "best weights so far": best}
    if moved_moments:
        plan.host["AdamW moments"] = count * optimizer.bytes_per_expert
    one = compute_seconds(target, step)
    moved, moving = sharded_traffic(target, backward=True)
    turn = len(micros) * max(one, moving)
    plan.estimates = {
        "TFLOP a forward and backward": f"{step.flops / 1e12:.3g}",
        "kernels it launches": str(step.kernels),
        "GB from others, the base": f"{moved / 1e9:.3g}",
        "GB to others, gradients": f"{2 * (replicas - 1) / replicas * slots.grads.nbytes / 1e9:.3g}",
        "a step, all at a time": seconds(turn),
        "the stage": seconds(turn * turns),
    }
    ways = ways_to_save(target, len(largest.items))
    if not moved_moments:
        ways.append("keep AdamW's moments on the host (train.moments=host)")
    if count > 1:
        ways.append(f"train fewer at a time (train.experts_in_flight={count // 2})")
    plan.check(cfg.plan.device_gb, ways)
    return plan


def _measure(target: Target, micro: MicroBatch, count: int, gate: bool) -> Measured:
    """A forward and backward of the blocks that the base has now."""
    slots = _slots(target, target.sites(), count, gate)
    runner = Runner(target.frozen, target.collator, slots)
    checkpointing = target.cfg.train.gradient_checkpointing
    with installed(target.frozen.model, (), slots.seen(), gate, checkpointing):
        known = [slots.weights, slots.grads, *slots.frozen()]
        trace = target.trace(lambda: runner.train(micro, [1.0] * len(micro.slots)), known)
    return Measured(trace.peak, trace.kept, trace.flops, trace.kernels)


def _slots(target: Target, shapes: dict[str, tuple[int, int]], count: int, gate: bool) -> Slots:
    lora, dtype = target.cfg.lora, torch.promote_types(target.base.dtype, torch.float32)
    if not gate:
        return ExpertSlots(shapes, count, lora.rank, lora.alpha, target.cfg.seed, dtype, META)

    def read(name: str) -> dict[str, SiteLora]:
        raise AssertionError(f"a plan reads no weights, but those of {name} were asked for")

    ranks = dict.fromkeys(shapes, target.experts.rank)
    return GateSlots(shapes, ranks, read, count, dtype, target.base.dtype, META)


def ways_to_save(target: Target, rows: int) -> list[str]:
    """Settings with which a training step needs less memory."""
    train = target.cfg.train
    ways = []
    if not target.sharded and target.world > 1:
        ways.append("shard the base (zero_stage=3)")
    if not train.gradient_checkpointing:
        ways.append("recompute activations (train.gradient_checkpointing=true)")
    if rows > 1:
        ways.append(f"cut train.micro_batch_tokens to {target.cfg.tasks.max_length * (rows // 2)}")
    return ways
