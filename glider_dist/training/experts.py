"""The stages ``train-experts`` and ``train-gates``: each rank trains the experts of its own tasks.

Idempotent per expert: what the pool already holds is left alone, so a second start does only what is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from glider_dist.errors import GliderError
from glider_dist.job import Job
from glider_dist.lora.bank import SiteBank, initial_site, stack_site
from glider_dist.model.attach import context_of, detach, install
from glider_dist.model.batch import Encoded
from glider_dist.model.recompute import recomputed
from glider_dist.model.sites import linear_sites, peft_targets
from glider_dist.pool.adapter import write_adapter
from glider_dist.pool.names import check_name
from glider_dist.pool.store import check_sites
from glider_dist.tasks.prompt import answer, prompt
from glider_dist.tasks.task import Task
from glider_dist.tracking.progress import progress
from glider_dist.training.fit import Fitted, Recipe, Runner, fit
from glider_dist.training.order import share_out

log = logging.getLogger(__name__)


def encode_part(job: Job, task: Task, part: str, limit: int | None = None) -> list[Encoded]:
    """Prompts and answers of one part of a task, in the order of the file."""
    examples = task.examples(part)[:limit]
    try:
        return [
            job.collator.encode(prompt(task.instruction(example, part), example), answer(example.target))
            for example in examples
        ]
    except GliderError as error:
        raise GliderError(f"task {task.name!r}, {part}: {error}") from None


def train_experts(job: Job) -> None:
    """Train an expert for every held-in task that has none in the pool, which is created if need be."""
    tasks = job.tasks.held_in
    there = job.open_pool(check_base=False) if (job.pool_path / "pool.json").exists() else None
    todo = [task for task in tasks if there is None or task.name not in there]
    _tell(job, "experts", todo, tasks)
    if not todo:
        return
    for task in todo:
        check_name(task.name)
    if there is not None:
        there.check_base(job.fingerprint)
    cfg = job.cfg
    chosen = linear_sites(job.base.model, cfg.lora.targets)
    data = {task.name: _data(job, task) for task in todo}
    pool = job.create_pool()
    targets = peft_targets(chosen, job.base.model)
    task_type = "SEQ_2_SEQ_LM" if job.collator.seq2seq else "CAUSAL_LM"
    recipe = Recipe(cfg.train.max_steps, cfg.train.batch_size, cfg.train.learning_rate, cfg.seed, cfg.train)

    def fresh(task: Task) -> tuple[dict[str, SiteBank], dict[str, torch.Tensor], list[torch.Tensor]]:
        banks = {
            site: initial_site([task.name], site, found.shape, cfg.lora.rank, cfg.lora.alpha, cfg.seed)
            .to(job.base.device, torch.float32)
            for site, found in chosen.items()
        }  # fmt: skip
        parameters = [tensor.requires_grad_() for bank in banks.values() for tensor in (bank.A, bank.B)]
        return banks, {}, parameters

    def store(task: Task, banks: dict[str, SiteBank], fitted: Fitted) -> None:
        pairs = zip(fitted.parameters[0::2], fitted.parameters[1::2], strict=True)
        weights = {site: (a[0], b[0].t()) for site, (a, b) in zip(banks, pairs, strict=True)}
        pool.write(
            task.name,
            lambda folder: write_adapter(folder, weights, cfg.lora.alpha, targets, cfg.base, task_type),
            {
                "task": task.name,
                "definition": task.definition,
                "category": task.category,
                "training": {"rank": cfg.lora.rank, "alpha": cfg.lora.alpha, **_record(recipe, fitted)},
                "scores": {"validation_loss": dict(fitted.validation)[fitted.best_step]},
            },
        )

    _train(job, "expert", todo, data, recipe, fresh, store)


def train_gates(job: Job) -> None:
    """Train a gate for every expert of a held-in task that has none; A and B stay as they are."""
    pool = job.open_pool(check_base=False)
    tasks = [task for task in job.tasks.held_in if task.name in pool]
    if not tasks:
        raise GliderError(f"pool {pool.path} has no expert of a held-in task; run train-experts first")
    todo = [task for task in tasks if not pool.expert(task.name).has_gate]
    _tell(job, "gates", todo, tasks)
    if not todo:
        return
    pool.check_base(job.fingerprint)
    data = {task.name: _data(job, task) for task in todo}
    cfg = job.cfg
    shapes = {name: site.shape for name, site in linear_sites(job.base.model).items()}
    for task in todo:
        check_sites(task.name, pool.expert(task.name).shapes(), shapes)
    batch_size = cfg.train.gate_batch_size or cfg.train.batch_size
    recipe = Recipe(cfg.train.gate_steps, batch_size, cfg.train.gate_learning_rate, cfg.seed, cfg.train)

    def frozen(task: Task) -> tuple[dict[str, SiteBank], dict[str, torch.Tensor], list[torch.Tensor]]:
        loras = pool.expert(task.name).weights()
        device, dtype = job.base.device, job.base.dtype
        banks = {site: stack_site([lora], shapes[site], dtype).to(device, dtype) for site, lora in loras.items()}
        gates = {site: torch.zeros(1, shapes[site][1], device=device).requires_grad_() for site in banks}
        return banks, gates, list(gates.values())

    def store(task: Task, banks: dict[str, SiteBank], fitted: Fitted) -> None:
        gate = {site: value[0] for site, value in zip(banks, fitted.parameters, strict=True)}
        pool.expert(task.name).write_gate(gate, gate_training=_record(recipe, fitted))

    _train(job, "gate", todo, data, recipe, frozen, store)


def _data(job: Job, task: Task) -> tuple[list[Encoded], list[Encoded]]:
    return (
        encode_part(job, task, "train"),
        encode_part(job, task, "validation", job.cfg.train.eval_examples),
    )


def _tell(job: Job, what: str, todo: Sequence[Task], tasks: Sequence[Task]) -> None:
    # No rank may store an expert before all have seen what is missing.
    job.ranks.barrier()
    if job.ranks.is_main:
        log.info("%d of %d %s to train on %d ranks", len(todo), len(tasks), what, job.ranks.world)


def _record(recipe: Recipe, fitted: Fitted) -> dict[str, Any]:
    return {
        "seed": recipe.seed,
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "best_step": fitted.best_step,
        "validation": [[step, round(loss, 6)] for step, loss in fitted.validation],
        "seconds": round(fitted.seconds, 2),
        "tokens_per_second": round(fitted.tokens / max(fitted.seconds, 1e-9), 1),
        "padding_share": round(fitted.padding / max(fitted.padding + fitted.tokens, 1), 4),
    }


def _train(
    job: Job,
    kind: str,
    todo: Sequence[Task],
    data: dict[str, tuple[list[Encoded], list[Encoded]]],
    recipe: Recipe,
    make: Any,
    store: Any,
) -> None:
    costs = [sum(map(len, data[task.name][0])) / len(data[task.name][0]) for task in todo]
    mine = [todo[index] for index in share_out(costs, job.ranks.world)[job.ranks.rank]]
    model, run = job.frozen.model, job.run
    bar = progress(total=len(mine) * recipe.steps, desc=f"{kind}s on rank 0", enabled=job.ranks.is_main)
    done: list[Fitted] = []
    step = 0
    for task in mine:
        banks, gates, parameters = make(task)
        with _installed(job, task.name, banks, gates, gated=kind == "gate"):
            runner = Runner(job.frozen, job.collator, parameters)

            def on_step(values: dict[str, float]) -> None:
                nonlocal step
                step += 1
                bar.update(1)
                run.log({f"{kind}/{key}": value for key, value in values.items()}, step)

            fitted = fit(runner, task.name, *data[task.name], recipe, on_step)
        store(task, banks, fitted)
        done.append(fitted)
    bar.close()
    if job.frozen.sharded:
        banks, gates, parameters = make(todo[0])
        with _installed(job, todo[0].name, banks, gates, gated=kind == "gate"):
            Runner(job.frozen, job.collator, parameters).finish()
    _report(job, kind, done)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def _report(job: Job, kind: str, done: Sequence[Fitted]) -> None:
    mine = [
        (fitted.losses[-1], dict(fitted.validation)[fitted.best_step], fitted.tokens, fitted.seconds)
        for fitted in done
    ]
    everything = [row for rows in job.ranks.gather(mine) for row in rows]
    seconds = max(sum(row[3] for row in rows) for rows in job.ranks.gather(mine))
    job.run.quantiles(f"{kind}/final_loss", [row[0] for row in everything])
    job.run.quantiles(f"{kind}/validation_loss", [row[1] for row in everything])
    rate = sum(row[2] for row in everything) / max(seconds, 1e-9)
    job.run.log({f"{kind}/tokens_per_second": rate, f"{kind}/seconds": seconds})
    if job.ranks.is_main:
        log.info("%d %ss in %.0f s, %.0f tokens/s over all ranks", len(everything), kind, seconds, rate)


@contextmanager
def _installed(
    job: Job, name: str, banks: dict[str, SiteBank], gates: dict[str, torch.Tensor], gated: bool
) -> Iterator[None]:
    model = job.frozen.model
    install(model, (name,), banks, gates)
    context_of(model).gated = gated
    block = recomputed(model) if job.cfg.train.gradient_checkpointing else nullcontext()
    try:
        with block:
            yield
    finally:
        detach(model)
