"""Joint training from an attached pool, or a fresh expert, to the best validated weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from glider_dist.errors import GliderError
from glider_dist.job import Job
from glider_dist.model.attach import context_of, detach, query_scores
from glider_dist.model.recompute import recomputed
from glider_dist.model.zero import ensure_group
from glider_dist.pool import ExpertPool
from glider_dist.pool.calibration import stored_calibration
from glider_dist.routing.strategies import check_router, needs_scores
from glider_dist.semantics.global_router import global_router
from glider_dist.tracking.progress import progress
from glider_dist.training import joint_multitask
from glider_dist.training.batches import packing_for
from glider_dist.training.deepspeed_moe import ExpertEngine
from glider_dist.training.joint_batches import Mixture, Row
from glider_dist.training.joint_config import deepspeed_config, of_the_weights, recipes_of
from glider_dist.training.joint_keep import JointKeeper
from glider_dist.training.joint_loop import JointLoop, Scope, Step
from glider_dist.training.joint_params import Trained
from glider_dist.training.joint_pool import versions_digest
from glider_dist.training.joint_routing import RouterExtras
from glider_dist.training.joint_scores import ScoresAhead
from glider_dist.training.joint_state import Tensors, gather_state
from glider_dist.training.prepare import task_facts
from glider_dist.training.trainee import Recipe
from glider_dist.training.unfinished import Facts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The best weights of the experts that this rank writes, and what their cards say of the training."""

    weights: dict[str, Tensors]
    card: dict[str, Any]


def train_routed(job: Job, pool: ExpertPool) -> Result | None:
    """Train through the pool's routers; None if no step was better than the pool is."""
    cfg, joint = job.cfg, job.cfg.joint
    check_router(cfg.router, len(pool))
    scores = ScoresAhead(global_router(job, pool) if needs_scores(cfg.router) else None, len(pool))
    model = job.attach(pool, cfg.router, torch.promote_types(job.base.dtype, torch.float32))
    try:
        context = context_of(model)
        owned: Sequence[int] = range(len(pool))
        if context.dispatch is not None:
            owned = context.dispatch.placement.owned(context.dispatch.mesh.expert_rank)
        trained = Trained(context, owned, joint.experts, joint.train != "gates", joint.train != "experts")
        extras = RouterExtras(joint, cfg.seed, cfg.router.top_k, len(context.banks))
        return _train(
            job, trained, extras, lambda rows: query_scores(model, extras.drop(scores.of(rows))), scores.ask
        )
    finally:
        scores.close()
        detach(model)


def train_multitask(job: Job) -> Result:
    """Train one fresh expert on all tasks, without a router.

    Raises:
        GliderError: no step was better than the base alone.
    """
    trained = joint_multitask.install_fresh(job)
    model = job.frozen.model
    try:
        extras = RouterExtras(job.cfg.joint, job.cfg.seed, 1, len(trained.context.banks))
        result = _train(job, trained, extras, partial(joint_multitask.scope, model), lambda rows: None)
    finally:
        detach(model)
    if result is None:
        raise GliderError("no step was better than the base alone; nothing was written: lower the learning rate")
    return result


def _train(
    job: Job, trained: Trained, extras: RouterExtras, scope: Scope, ask: Callable[[list[Row]], None]
) -> Result | None:
    """Train and validate. The best validated weights, or None if they were the first."""
    cfg = job.cfg
    recipes = recipes_of(cfg)
    recipe = recipes["experts"]
    train = Mixture(job.tasks.held_in, "train", job.collator)
    validation = Mixture(job.tasks.held_in, "validation", job.collator, cfg.train.eval_examples).rows()
    started = time.perf_counter()
    ensure_group(job.base.device)
    config = deepspeed_config(cfg, job.ranks.world, recipe.learning_rate, trained.elements)
    engine = ExpertEngine(*trained.initial(), _parallel(job), config)
    packing = packing_for(
        job.base.device, job.base.model, cfg.train.micro_batch_tokens, cfg.train.micro_batch_size
    )
    loop = JointLoop(job.frozen.model, job.collator, engine, trained, scope, recipes, packing, extras)
    if job.ranks.is_main:
        mb = {key: value / 1e6 for key, value in engine.local_bytes.items()}
        log.info("rank 0 keeps %.1f MB of experts and gates, %.1f MB of optimizer", *mb.values())
    keeper = JointKeeper(job, engine, trained, loop, _facts(job, recipes))
    best = keeper.restore()
    done = loop.progress.step
    bar = progress(total=recipe.steps, initial=done, desc="steps", enabled=job.ranks.is_main)

    def after(step: Step) -> bool:
        nonlocal best
        bar.update()
        values = {"loss": step.loss, "router_loss": step.router_loss, "grad_norm": step.norm}
        rates = {f"learning_rate/{kind}": rate for kind, rate in step.rates.items()}
        job.run.log({f"joint/{key}": value for key, value in {**values, **rates}.items()}, step.number)
        if step.number % recipe.eval_every == 0 or step.number == recipe.steps:
            _tell(job, loop, loop.validate(validation))
            if loop.progress.best[0] == step.number:
                best = gather_state(engine, trained, moments=False, keep=keeper.writes)
        job.run.progress("steps", step.number, recipe.steps)
        return keeper.after_step(best)

    with (
        closing(keeper),
        recomputed(job.frozen.model) if cfg.train.gradient_checkpointing else nullcontext(),
    ):
        if not loop.progress.validation:
            _tell(job, loop, loop.validate(validation))
        loop.run(train.steps(cfg.seed, recipe.batch_size, recipe.steps, done), after, ask)
    bar.close()
    job.stop.agree(keeper.stopped and loop.progress.step < recipe.steps)
    if best is None:
        return None
    card = _card(job, loop, recipes)
    return Result(best, {**card, "seconds": round(time.perf_counter() - started, 1)})


def _card(job: Job, loop: JointLoop, recipes: dict[str, Recipe]) -> dict[str, Any]:
    """What the experts' cards say of the training."""
    cfg, found, recipe = job.cfg, loop.progress, recipes["experts"]
    return {
        "trained": "multitask" if cfg.joint.multitask else cfg.joint.train,
        "tasks": [task.name for task in job.tasks.held_in],
        "router": {"kind": cfg.router.kind, "top_k": cfg.router.top_k},
        "seed": cfg.seed,
        "steps": found.step,
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "gate_learning_rate": recipes["gates"].learning_rate,
        "best_step": found.best[0],
        "validation_loss": round(found.best[1], 6),
        "validation": [[step, round(loss, 6)] for step, loss in found.validation],
        "tokens": found.tokens,
        "ranks": job.ranks.world,
        "zero_stage": cfg.zero_stage,
        "expert_parallel": _parallel(job),
    }


def _parallel(job: Job) -> int:
    return job.cfg.mesh.expert_parallel if job.ranks.world > 1 else 1


def _facts(job: Job, recipes: dict[str, Recipe]) -> Facts:
    """What the training depends on, apart from the ranks and how they share it."""
    cfg = job.cfg
    facts = {
        f"{what} ({task.name})": value for task in job.tasks.held_in for what, value in task_facts(task).items()
    }
    for kind, recipe in recipes.items():
        facts |= {f"{key} of the recipe of {kind}": str(value) for key, value in asdict(recipe).items()}
    for group, settings in (("joint", of_the_weights(cfg.joint)), ("router", asdict(cfg.router))):
        facts |= {f"{group}.{key}": str(value) for key, value in settings.items()}
    facts["tasks.max_length"] = str(cfg.tasks.max_length)
    if not cfg.joint.multitask:
        pool = job.open_pool(check_base=False)
        facts |= {
            "the pool": versions_digest(pool),
            "the pool's calibration": str(stored_calibration(pool).get("key")),
        }
    return facts


def _tell(job: Job, loop: JointLoop, loss: float) -> None:
    step = loop.progress.step
    job.run.log({"joint/validation_loss": loss}, step)
    if job.ranks.is_main:
        log.info("validation after %d steps: %.4f nats per target token", step, loss)
