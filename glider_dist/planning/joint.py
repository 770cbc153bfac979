"""The plan of ``train-joint``: experts and gates train through the routers, and DeepSpeed holds them."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from glider_dist.errors import GliderError
from glider_dist.model.batch import target_nll
from glider_dist.model.recompute import recomputed
from glider_dist.planning.attached import attached, measure_trained
from glider_dist.planning.depth import measured
from glider_dist.planning.report import StagePlan, seconds
from glider_dist.planning.serving import add_exchange
from glider_dist.planning.target import Target
from glider_dist.planning.traffic import bandwidth, compute_seconds, sharded_traffic
from glider_dist.planning.training import ways_to_save
from glider_dist.routing.strategies import check_router
from glider_dist.training.batches import packing_for
from glider_dist.training.joint_batches import Row, micro_batches
from glider_dist.training.joint_config import check_joint, deepspeed_config, recipes_of

_FP32 = 4


def plan_joint(target: Target) -> StagePlan:
    """Raises GliderError if the stage cannot run as configured or the device is too small."""
    cfg, train = target.cfg, target.cfg.train
    check_joint(cfg)
    check_router(cfg.router, len(target.experts.names))
    recipe = recipes_of(cfg)["experts"]
    if recipe.batch_size < target.world:
        raise GliderError(
            f"train-joint: a step has {recipe.batch_size} examples for {target.world} ranks, so that some would "
            "have none; raise joint.batch_size, or use fewer ranks"
        )
    packing = packing_for(target.device, target.base.model, train.micro_batch_tokens, train.micro_batch_size)
    rows = [Row("", target.row(), place) for place in range(recipe.batch_size)]
    micros = micro_batches(rows, target.world, packing)[0]
    largest = max(micros, key=len)
    batch = target.collator.batch([row.encoded for row in largest])
    model, owned = target.frozen.model, max(1, target.most_owned)

    def loss() -> torch.Tensor:
        return target_nll(model, batch).sum()

    with recomputed(model) if train.gradient_checkpointing else nullcontext():
        cost = measured(model, lambda: measure_trained(target, cfg.router, loss, len(largest), owned))
    experts, gates = trained_elements(target)
    deepspeed_config(cfg, target.world, recipe.learning_rate, experts + gates)  # refuses a file that contradicts
    plan = StagePlan("train-joint")
    plan.counts = {
        "experts on a rank": str(target.most_owned),
        "steps, examples a step": f"{recipe.steps} x {recipe.batch_size}",
        "forwards a step": f"{len(micros)} of {len(largest)} x {cfg.tasks.max_length}",
    }
    replicas = target.world // target.expert_parallel
    stage = cfg.zero_stage if target.world > 1 else 0
    plan.memory = {
        **target.base_bytes(),
        "experts and gates that stay": _FP32 * staying_elements(target),
        "experts in training": zero_bytes(experts, replicas, stage),
        "gates in training": zero_bytes(gates, target.world, stage),
        "activations, logits": cost.peak,
        "reserve (estimated)": target.reserve,
    }
    written = _FP32 * written_elements(target)
    plan.host = {
        **target.loading_bytes(),
        "weights and moments, while saved": 3 * written,
        "best weights, and better ones": 2 * written,
        "index of descriptions": target.index_bytes(),
    }
    moved, moving = sharded_traffic(target, backward=True)
    exchanging = 0.0
    plan.estimates = {
        "TFLOP a forward and backward": f"{cost.flops / 1e12:.3g}",
        "kernels it launches": str(cost.kernels),
        "GB from others, the base": f"{moved / 1e9:.3g}",
    }
    if target.expert_parallel > 1:
        tokens = len(largest) * cfg.tasks.max_length
        exchanging = add_exchange(target, plan, cfg.router, cost.groups, tokens, trained=True)
    reduced = 2 * _FP32 * (experts * (1 - 1 / replicas) + gates * (1 - 1 / target.world))
    reducing = reduced / bandwidth(target, target.world)
    plan.estimates["GB of gradients and weights"] = f"{reduced / 1e9:.3g}"
    step = len(micros) * (max(compute_seconds(target, cost), moving) + exchanging) + reducing
    plan.estimates |= {"a step": seconds(step), "the stage": seconds(step * recipe.steps)}
    ways = [*ways_to_save(target, len(largest)), "share the experts among more ranks (mesh.expert_parallel)"]
    if gates:
        ways.append("train no gates (joint.train=experts)")
    plan.check(cfg.plan.device_gb, ways)
    return plan


def _elements(target: Target) -> tuple[int, int]:
    """Numbers of the experts that a rank owns at most, and of all gates."""
    with attached(target, target.cfg.router, torch.float32) as context:
        experts = sum(bank.A.numel() + bank.B.numel() for bank in context.banks.values())
        gates = sum(gate.numel() for gate in context.gates.values())
    return experts // len(target.experts.names) * target.most_owned, gates


def trained_elements(target: Target) -> tuple[int, int]:
    """Of those, how many train: all but what ``joint.train`` and ``joint.experts`` leave as it is."""
    joint, (experts, gates) = target.cfg.joint, _elements(target)
    share = len(joint.experts) / len(target.experts.names) if joint.experts else 1.0
    own = min(experts, round(share * experts * target.expert_parallel))
    return (0 if joint.train == "gates" else own), (0 if joint.train == "experts" else round(share * gates))


def written_elements(target: Target) -> int:
    """Of those that train, the ones of the experts that a rank owns, which the first of its replicas copies to the
    host: of gates, each rank trains all and writes those of its experts."""
    experts, gates = trained_elements(target)
    return experts + min(gates, _elements(target)[1] * target.most_owned // len(target.experts.names))


def staying_elements(target: Target) -> int:
    """Of experts and gates of which some train: the others, and in each forward all of them in one piece."""
    pairs = list(zip(_elements(target), trained_elements(target), strict=True))
    return sum(every - trained + (every if 0 < trained < every else 0) for every, trained in pairs)


def zero_bytes(elements: int, ranks: int, stage: int) -> int:
    """Bytes that AdamW in fp32 takes on a rank for parameters that so many ranks hold.

    Rajbhandari et al., arXiv 1910.02054, section 5, with fp32 in place of fp16 weights and gradients: weights 4,
    gradients 4 and moments 8 bytes a parameter; stage 1 shards the moments, 2 the gradients, 3 the weights, too.
    DeepSpeed keeps a second copy of the weights that a rank updates (stages 1 to 3). All weights and all gradients
    are whole for a moment in every stage, as they enter the graph together.
    """
    own = -(-elements // ranks) if stage else elements
    whole = 2 * elements
    shards = own * ((stage >= 1) + (stage >= 2) + (stage >= 3) * (ranks > 1))
    return _FP32 * (whole + shards + 2 * own)
