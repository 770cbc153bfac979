"""The stages ``train-experts`` and ``train-gates``: one job trains what the pool lacks, many experts at a time.

Each rank trains the experts of its own tasks, with replicas where these are too few or too unequal for the ranks.
Idempotent per expert: what the pool already holds is left alone, so a second start does only what is missing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from glider_dist.errors import GliderError
from glider_dist.job import Job
from glider_dist.model.sites import every_linear, linear_sites, peft_targets
from glider_dist.parallel.replicas import Replicas
from glider_dist.pool.adapter import (
    WEIGHTS_FILE,
    SiteLora,
    check_finite,
    inspect_adapter,
    write_adapter,
)
from glider_dist.pool.lock import hold_all
from glider_dist.pool.names import check_name
from glider_dist.pool.store import check_sites
from glider_dist.tasks.task import Task
from glider_dist.tracking.progress import begin_at, progress
from glider_dist.training.batches import packing_for, slots_for
from glider_dist.training.cotrain import CoTraining, Turn
from glider_dist.training.prepare import SHARES, forget_done, note_shares, prepare, task_facts
from glider_dist.training.runner import Runner, installed
from glider_dist.training.slots import ExpertSlots, GateSlots, Slots
from glider_dist.training.summary import report
from glider_dist.training.trainee import Trainee
from glider_dist.training.unfinished import Facts, Interval, Unfinished, digest, facts_of

log = logging.getLogger(__name__)


def train_experts(job: Job) -> None:
    """Train an expert for every held-in task that has none in the pool, which is created if need be."""
    tasks = job.tasks.held_in
    there = job.open_pool(check_base=False) if (job.pool_path / "pool.json").exists() else None
    missing = [task.name for task in tasks if there is None or task.name not in there]
    todo = _begin(job, "expert", missing, tasks)
    if not todo:
        return
    for task in todo:
        check_name(task.name)
        if (folder := job.pool_path / "experts" / task.name).exists():
            raise GliderError(
                f"{folder} is there, but holds no {WEIGHTS_FILE}: restore it, or delete the folder to train anew"
            )
    if there is not None:
        there.check_base(job.fingerprint)
    lora, cfg = job.cfg.lora, job.cfg
    chosen = linear_sites(job.base.model, lora.targets)
    share = prepare(job, todo, "expert")
    pool = job.create_pool()
    targets = peft_targets(chosen, job.base.model)
    task_type = "SEQ_2_SEQ_LM" if job.collator.seq2seq else "CAUSAL_LM"
    task_of = {task.name: task for task in todo}
    shapes = {name: site.shape for name, site in chosen.items()}

    def slots(count: int) -> ExpertSlots:
        return ExpertSlots(shapes, count, lora.rank, lora.alpha, cfg.seed, _dtype(job), job.base.device)

    def store(made: ExpertSlots, trainee: Trainee, row: torch.Tensor) -> None:
        task, weights = task_of[trainee.name], made.weights_of(row)
        card = {
            "task": task.name,
            "definition": task.definition,
            "category": task.category,
            "training": {"rank": lora.rank, "alpha": lora.alpha, "base_bits": cfg.base_bits, **trainee.record()},
            "scores": {"validation_loss": trainee.progress.best_loss} if trainee.progress.best_step else {},
        }

        def fill(folder: Path) -> None:
            write_adapter(folder, weights, lora.alpha, targets, pool.base, task_type)

        try:
            pool.write(task.name, fill, card, replace=False)
        except FileExistsError:
            raise GliderError(
                f"expert {task.name!r} was added to pool {pool.path} while it was in training here; that one "
                "stays, start the job again to go on with the others"
            ) from None

    def facts(name: str) -> Facts:
        return {**task_facts(task_of[name]), **_base_facts(job), "lora": digest(lora)}

    _train(job, "expert", *share, slots, store, facts)


def train_gates(job: Job) -> None:
    """Train a gate for every expert of a held-in task that has none; A and B stay as they are."""
    pool = job.open_pool(check_base=False)
    tasks = [task for task in job.tasks.held_in if task.name in pool]
    if job.tasks.held_in and not tasks:
        raise GliderError(f"pool {pool.path} has no expert of a held-in task; run train-experts first")
    missing = [task.name for task in tasks if not pool.expert(task.name).has_gate]
    todo = _begin(job, "gate", missing, tasks)
    if not todo:
        return
    pool.check_base(job.fingerprint)
    known = {name: site.shape for name, site in every_linear(job.base.model).items()}
    ranks: dict[str, int] = {}
    sites_of = {}
    for task in todo:
        info = inspect_adapter(pool.expert(task.name).folder)
        check_sites(task.name, info.shapes, known)
        sites_of[task.name] = set(info.shapes)
        ranks |= {site: max(rank, ranks.get(site, 0)) for site, rank in info.ranks.items()}
    shapes = {site: shape for site, shape in known.items() if site in ranks}
    share = prepare(job, todo, "gate")

    def slots(count: int) -> GateSlots:
        def read(name: str) -> dict[str, SiteLora]:
            loras = pool.expert(name).weights()
            check_finite(name, loras)
            return loras

        return GateSlots(shapes, ranks, read, count, _dtype(job), job.base.dtype, job.base.device)

    files = {task.name: pool.expert(task.name).card().get("files") for task in todo}
    task_of = {task.name: task for task in todo}

    def store(made: GateSlots, trainee: Trainee, row: torch.Tensor) -> None:
        gate = {site: v for site, v in made.gate_of(row).items() if site in sites_of[trainee.name]}
        expert = pool.expert(trainee.name)
        if expert.card().get("files") != files[trainee.name]:
            raise GliderError(
                f"expert {trainee.name!r} of pool {pool.path} was changed while its gate was in training, which "
                "does not fit it any more; run train-gates again"
            )
        expert.write_gate(gate, gate_training=trainee.record())

    def facts(name: str) -> Facts:
        return {**task_facts(task_of[name]), **_base_facts(job), "the expert itself": digest(files[name])}

    _train(job, "gate", *share, slots, store, facts)


def _base_facts(job: Job) -> Facts:
    bits = {"base_bits": str(job.cfg.base_bits)} if job.cfg.base_bits else {}
    return {"the base": digest(job.fingerprint), "dtype": str(job.base.dtype), **bits}


def _dtype(job: Job) -> torch.dtype:
    return torch.promote_types(job.base.dtype, torch.float32)


def _begin(job: Job, kind: str, missing: Sequence[str], tasks: Sequence[Task]) -> list[Task]:
    """The tasks to train: those whose expert or gate rank 0 is missing."""
    # No rank may store an expert before all have come here.
    todo = set(job.ranks.from_main(missing))
    if job.ranks.is_main:
        log.info("%d of %d %ss to train on %d ranks", len(todo), len(tasks), kind, job.ranks.world)
        forget_done(job, kind, {task.name for task in tasks} - todo)
    return [task for task in job.tasks.held_in if task.name in todo]


S = TypeVar("S", bound=Slots)


def _train(
    job: Job,
    kind: str,
    mine: Sequence[Trainee],
    replicas: Replicas,
    make: Callable[[int], S],
    store: Callable[[S, Trainee, torch.Tensor], None],
    facts: Callable[[str], Facts],
) -> None:
    """Train this rank's experts or gates with its replicas, store each when it is done and report on all ranks'.

    Args:
        make: slots for so many.
        store: writes one that is done to the pool, from its best row.
        facts: what, besides recipe and examples, the training by that name depends on.

    Raises:
        GliderError: some stopped early as their loss was not finite; the others are done and stored.
        Stopped: the job was asked to, and not all are done.
    """
    train, ranks = job.cfg.train, job.ranks
    slots = make(slots_for(job.base.device, train.experts_in_flight, len(mine)))
    runner = Runner(job.frozen, job.collator, slots)
    packing = packing_for(job.base.device, job.base.model, train.micro_batch_tokens, train.micro_batch_size)
    depends = {trainee.name: facts_of(trainee, **facts(trainee.name)) for trainee in mine}
    files = job.checkpoints(kind, train.keep_last)
    interval = Interval(train.save_steps, train.save_minutes)
    unfinished = Unfinished(files, depends, interval, replicas)
    ranks.together(unfinished.check)
    names = [trainee.name for trainee in mine if replicas.first]
    locks = ranks.together(lambda: hold_all(job.pool_path, names))
    note_shares(job, kind, mine, replicas)
    loop = CoTraining(runner, mine, packing, unfinished, replicas, train.moments)
    if ranks.is_main:
        if replicas.count > 1:
            log.info("%d ranks train each %s together, each on its part of the rows", replicas.count, kind)
        log.info(
            "up to %d %ss at a time on a rank, %.1f MB each in training (%.1f of them AdamW moments), "
            "beside %.0f MB of the base",
            len(slots.names), kind, (slots.bytes_per_expert + loop.optimizer.bytes_per_expert) / 1e6,
            loop.optimizer.bytes_per_expert / 1e6, job.frozen.local_bytes / 1e6,
        )  # fmt: skip
    bar = progress(total=sum(t.recipe.steps for t in mine), desc=f"{kind}s on rank 0", enabled=ranks.is_main)
    began = False

    def on_turn(turn: Turn) -> None:
        nonlocal began
        steps = sum(trainee.progress.step for trainee in mine)
        if not began:
            begin_at(bar, steps - len(turn.losses))
        began = True
        bar.update(steps - bar.n)
        job.run.progress(f"{kind} steps on rank 0", steps, int(bar.total or 0))
        job.run.log({f"{kind}/{key}": value for key, value in turn.means().items()}, unfinished.turn + 1)

    started = time.perf_counter()
    model = job.frozen.model
    gated = kind == "gate"
    with locks, installed(model, (), slots.seen(), gated=gated, checkpointing=train.gradient_checkpointing):
        done = loop.run(lambda trainee, row: store(slots, trainee, row), on_turn, lambda: job.stop.wished)
    bar.close()
    job.stop.agree(not done)
    ranks.on_main(lambda: (files.folder / SHARES).unlink(missing_ok=True))
    report(job, kind, mine if replicas.first else [], runner, time.perf_counter() - started)
    assert not any(parameter.requires_grad for parameter in model.parameters())
