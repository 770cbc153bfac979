"""``glider-dist plan`` and ``--dry-run``: everything is built on the meta device, nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable

from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.planning.joint import plan_joint
from glider_dist.planning.report import StagePlan, gigabytes, stages_table
from glider_dist.planning.serving import plan_calibrate, plan_evaluate
from glider_dist.planning.target import Target
from glider_dist.planning.training import plan_experts, plan_gates

STAGES: dict[str, Callable[[Target], StagePlan]] = {
    "train-experts": plan_experts,
    "train-gates": plan_gates,
    "train-joint": plan_joint,
    "calibrate": plan_calibrate,
    "evaluate": plan_evaluate,
}


def run(cfg: Config, command: str, ranks: int | None) -> int:
    """Plan a stage, or under ``plan`` those in ``plan.stages``, and print the table; returns 0.

    Args:
        ranks: of the job; None: ``plan.nodes`` times ``plan.gpus_per_node``.

    Raises:
        GliderError: a stage cannot work, or has no base model that could be planned for.
    """
    stages = cfg.plan.stages if command == "plan" else [command]
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise GliderError(f"{unknown[0]} cannot be planned; what can be is {', '.join(STAGES)}")
    if os.environ.get("RANK", "0") != "0":
        return 0  # under a launcher, once is enough
    target = Target(cfg, ranks)
    plans = [STAGES[stage](target) for stage in stages]
    print(f"{head(target)}\n\n{stages_table(plans)}")
    if target.sharded:
        size = gigabytes(target.frozen.nbytes)
        print(
            "\nnote: each rank loads its share of the base alone, but rank 0's host memory may hold "
            f"all {size} GB of it for as long as that takes"
        )
    return 0


def head(target: Target) -> str:
    """Base, experts and ranks, a line each."""
    model, shapes = target.base.model, target.shapes
    size = sum(parameter.numel() for parameter in model.parameters())
    rank = target.experts.rank
    lora = sum(rank * (d_out + d_in) for d_out, d_in in shapes.values())
    gate = sum(d_in for _, d_in in shapes.values())
    plan, mesh = target.cfg.plan, target.mesh
    nodes = -(-target.world // plan.gpus_per_node)
    owned = "" if target.expert_parallel == 1 else f"; a rank owns {target.most_owned} experts at most"
    return "\n".join(
        (
            f"base:    {target.cfg.base}, {size / 1e9:.3g} B parameters, {str(target.base.dtype)[6:]}",
            f"experts: {len(target.experts.names)} of rank {rank} at {len(shapes)} sites: "
            f"{lora / 1e6:.1f} M LoRA and {gate / 1e6:.2f} M gate parameters each",
            f"ranks:   {target.world} on {nodes} node{'s' * (nodes > 1)}: {mesh or 'one process'}{owned}",
        )
    )
