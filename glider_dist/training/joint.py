"""The stage ``train-joint``: train a pool's experts and gates together, through the routers that will use them.

It starts from a pool and leaves new versions of what trained in it. The base is frozen; ZeRO 0 to 3 hold the
experts, gates and optimizer (``deepspeed_moe``), the base is sharded besides under ZeRO 3 (``model.engine``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist

from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.evaluation import calibrate
from glider_dist.evaluation.queries import queries_digest
from glider_dist.job import Job
from glider_dist.model.attach import context_of, detach, query_scores
from glider_dist.model.recompute import recomputed
from glider_dist.pool import ExpertPool
from glider_dist.pool.calibration import CALIBRATION_FILE
from glider_dist.pool.files import read_json, write_json
from glider_dist.routing.strategies import check_router, needs_scores
from glider_dist.semantics.global_router import global_router
from glider_dist.tracking.progress import progress
from glider_dist.training.batches import packing_for
from glider_dist.training.deepspeed_moe import ExpertEngine
from glider_dist.training.joint_batches import Row, Union
from glider_dist.training.joint_config import check_combination, deepspeed_config
from glider_dist.training.joint_loop import JointLoop, Step
from glider_dist.training.joint_params import Trained
from glider_dist.training.joint_pool import complete, move_into_place, write_version
from glider_dist.training.joint_routing import RouterExtras
from glider_dist.training.joint_scores import QueryScores
from glider_dist.training.joint_state import Tensors, gather_state
from glider_dist.training.trainee import Recipe

log = logging.getLogger(__name__)
RECORD = "joint.json"


def run(job: Job) -> None:
    """Train the pool jointly and replace what trained; nothing if that was done already."""
    check(job.cfg)
    pool = job.open_pool(check_base=False)
    job.ranks.on_main(lambda: _finish_earlier(pool))
    pool = job.open_pool(check_base=False)
    key = _key(job)
    record = job.run_dir / RECORD
    if record.exists() and read_json(record) == {"key": key, "pool": _pool_hash(pool)}:
        if job.ranks.is_main:
            log.info("this training was done already, and the pool is as it left it")
        return
    job.ranks.barrier()
    pool.check_base(job.fingerprint)
    calibrated = (pool.router_dir / CALIBRATION_FILE).exists()
    best = _train(job, pool)
    if best is None:
        if job.ranks.is_main:
            log.warning("no step was better than the pool is, which stays as it was; try lower learning rates")
    else:
        _write(job, pool, *best)
    pool = job.open_pool()
    job.ranks.on_main(lambda: write_json(record, {"key": key, "pool": _pool_hash(pool)}))
    if best is not None and calibrated and job.cfg.joint.recalibrate:
        calibrate.run(job)


def check(cfg: Config) -> None:
    """Raises GliderError for settings that cannot be trained with; before anything is read."""
    check_combination(cfg)
    trainable = cfg.router.kind in ("phatgoose", "global") or (
        cfg.router.kind == "glider" and cfg.router.local == "gate"
    )
    if not trainable:
        kind = f"{cfg.router.kind} with router.local={cfg.router.local}"
        raise GliderError(
            f"train-joint cannot train through router.kind={kind}: its scores would have to follow the experts; "
            "use glider, phatgoose or global"
        )
    if cfg.dispatch == "local" and cfg.mesh.expert_parallel > 1:
        raise GliderError(
            "dispatch=local cannot train experts that other ranks own; use auto, all_to_all or gather"
        )


def recipes_of(cfg: Config) -> dict[str, Recipe]:
    """Of experts and gates: their learning rates differ."""
    joint = cfg.joint
    rates = {
        "experts": joint.learning_rate or cfg.train.learning_rate,
        "gates": joint.gate_learning_rate or cfg.train.gate_learning_rate,
    }
    base = replace(
        Recipe.of(cfg.train, cfg.seed),
        steps=joint.steps or cfg.train.max_steps,
        batch_size=joint.batch_size or cfg.train.batch_size,
    )
    return {kind: replace(base, learning_rate=rate) for kind, rate in rates.items()}


def _finish_earlier(pool: ExpertPool) -> None:
    if move_into_place(pool):
        log.info("an earlier train-joint had written its experts; they are in place now")


def _train(job: Job, pool: ExpertPool) -> tuple[dict[str, Tensors], dict[str, Any]] | None:
    """The best weights of the experts that this rank owns and what their cards say; None if none were better."""
    cfg, joint = job.cfg, job.cfg.joint
    recipes = recipes_of(cfg)
    recipe = recipes["experts"]
    check_router(cfg.router, len(pool))
    router = global_router(job, pool) if needs_scores(cfg.router) else None
    train = Union(job.tasks.held_in, "train", job.collator)
    validation = Union(job.tasks.held_in, "validation", job.collator, cfg.train.eval_examples).rows()
    ensure_group()
    wide = torch.promote_types(job.base.dtype, torch.float32)
    model = job.attach(pool, cfg.router, wide)
    scores = QueryScores(router, len(pool))
    started = time.perf_counter()
    try:
        context = context_of(model)
        mesh = job.mesh
        owned = range(len(pool)) if context.dispatch is None else _owned(context)
        trained = Trained(context, owned, joint.experts, joint.train != "gates", joint.train != "experts")
        parallel = mesh.expert_parallel if mesh is not None else 1
        config = deepspeed_config(cfg, job.ranks.world, recipe.learning_rate, trained.elements)
        engine = ExpertEngine(trained.experts, trained.gates, parallel, config)
        extras = RouterExtras(joint, cfg.seed, cfg.router.top_k, len(context.banks))

        def scope(rows: Any) -> Any:
            return query_scores(model, extras.drop(scores.of(rows)))

        packing = packing_for(job.base.device, cfg.train.micro_batch_tokens, cfg.train.micro_batch_size)
        loop = JointLoop(model, job.collator, engine, trained, scope, recipes, packing, extras)
        with recomputed(model) if cfg.train.gradient_checkpointing else nullcontext():
            best = _steps(job, loop, train, validation, scores)
    finally:
        scores.close()
        detach(model)
    if best is None:
        return None
    found = loop.progress
    card = {
        "trained": joint.train,
        "tasks": [task.name for task in job.tasks.held_in],
        "router": {"kind": cfg.router.kind, "top_k": cfg.router.top_k},
        "seed": cfg.seed,
        "steps": found.step,
        "batch_size": recipe.batch_size,
        "learning_rate": recipes["experts"].learning_rate,
        "gate_learning_rate": recipes["gates"].learning_rate,
        "best_step": found.best[0],
        "validation": [[step, round(loss, 6)] for step, loss in found.validation],
        "tokens": found.tokens,
        "ranks": job.ranks.world,
        "zero_stage": cfg.zero_stage,
        "expert_parallel": parallel,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return best, card


def _owned(context: Any) -> list[int]:
    dispatch = context.dispatch
    return list(dispatch.placement.owned(dispatch.mesh.expert_rank))


def _steps(
    job: Job, loop: JointLoop, train: Union, validation: list[Row], scores: QueryScores
) -> dict[str, Tensors] | None:
    """Train and validate; the best validated weights, or None if the first ones were."""
    recipe = loop.recipes["experts"]
    best: dict[str, Tensors] | None = None
    _log_validation(job, loop, loop.validate(validation))
    bar = progress(total=recipe.steps, desc="steps", enabled=job.ranks.is_main)

    def after(step: Step) -> bool:
        nonlocal best
        bar.update()
        values = {"loss": step.loss, "router_loss": step.router_loss, "grad_norm": step.norm}
        rates = {f"learning_rate/{kind}": rate for kind, rate in step.rates.items()}
        job.run.log({f"joint/{key}": value for key, value in {**values, **rates}.items()}, step.number)
        if step.number % recipe.eval_every == 0 or step.number == recipe.steps:
            _log_validation(job, loop, loop.validate(validation))
            if loop.progress.best[0] == step.number:
                best = gather_state(loop.engine, loop.trained, moments=False)
        return False

    loop.run(train.steps(job.cfg.seed, recipe.batch_size, recipe.steps), after, scores.ask)
    bar.close()
    return best


def _log_validation(job: Job, loop: JointLoop, loss: float) -> None:
    step = loop.progress.step
    job.run.log({"joint/validation_loss": loss}, step)
    if job.ranks.is_main:
        log.info("validation after %d steps: %.4f nats per target token", step, loss)


def _write(job: Job, pool: ExpertPool, weights: dict[str, Tensors], card: dict[str, Any]) -> None:
    """Each expert by the first rank that owns it; then rank 0 moves all of them into place."""
    mesh = job.mesh
    first = mesh is None or mesh.rank == mesh.replica_ranks[0]
    problem = ""
    try:
        for name, tensors in weights.items() if first else ():
            write_version(pool, name, tensors, card)
    except (GliderError, OSError) as error:
        problem = f"the new version of an expert could not be written ({error}); the pool is as it was"
    told = job.ranks.gather((problem, list(weights)))
    if problem := next((text for text, _ in told if text), ""):
        raise GliderError(problem)
    names = sorted({name for _, part in told for name in part})

    def swap() -> None:
        complete(pool, names)
        move_into_place(pool)
        log.info("%d experts have new versions in %s", len(names), pool.path)

    job.ranks.on_main(swap)


def ensure_group() -> None:
    """DeepSpeed wants a process group even around a single process."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _key(job: Job) -> str:
    """Everything the trained weights depend on, apart from the pool."""
    cfg = job.cfg
    parts = [queries_digest(job.tasks.held_in, part, 1 << 60) for part in ("train", "validation")]
    state = {
        "data": parts,
        "joint": asdict(cfg.joint),
        "train": asdict(cfg.train),
        "router": asdict(cfg.router),
        "seed": cfg.seed,
        "max_length": cfg.tasks.max_length,
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _pool_hash(pool: ExpertPool) -> str:
    files = {expert.name: expert.card().get("files", {}) for expert in pool.experts()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
