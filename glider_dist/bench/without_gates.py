"""``glider-dist bench without-gates``: the routers that need no gates, and random adapters as a control.

Two copies of the pool are made in ``run_dir/pools``: ``trained``, the experts without their gates, and ``random``,
where every A and B is random with its own matrix's shape and root mean square. Both have the same descriptions,
index and calibration, so what is left in the control is routing without anything to route to.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from glider_dist.errors import GliderError
from glider_dist.evaluation import calibrate, evaluate
from glider_dist.evaluation.queries import make_queries
from glider_dist.evaluation.report import RouterResult, summary_table
from glider_dist.evaluation.routers import evaluate_router
from glider_dist.job import Job
from glider_dist.model.attach import attach_pool, detach
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import WEIGHTS_FILE
from glider_dist.pool.adapter_config import CONFIG_FILE
from glider_dist.pool.files import replacing, write_tensors
from glider_dist.routing.strategies import STRATEGIES, strategy_of
from glider_dist.semantics import describe, index, indexing
from glider_dist.semantics.global_router import global_router
from glider_dist.tasks.task import stable_hash

Tensors = dict[str, torch.Tensor]


def run(job: Job) -> None:
    """Describe, index, calibrate and evaluate the copies; prints one table and writes it to ``run_dir``.

    Raises:
        GliderError: a router of ``evaluate.routers`` needs gates.
    """
    cfg = job.cfg
    for kind in cfg.evaluate.routers:
        if strategy_of(dataclasses.replace(cfg.router, kind=kind)).local in ("gate", "activation"):
            raise GliderError(f"bench without-gates cannot run {kind!r} with router.local={cfg.router.local}")
    source, folder = job.open_pool(), job.run_dir / "pools"
    job.ranks.on_main(lambda: copy_pool(source, folder / "trained", lambda name, tensors: tensors))
    job.cfg = dataclasses.replace(cfg, pool=str(folder / "trained"))
    for stage in (describe.run, indexing.run, calibrate.run):
        stage(job)
    results = evaluate.run(job)
    trained = job.open_pool()
    job.ranks.on_main(lambda: _make_control(trained, folder / "random", cfg.seed))
    results += evaluate_control(job, ExpertPool.open(folder / "random"))
    if job.ranks.is_main:
        text = summary_table(results, cfg.evaluate.bootstrap, cfg.seed)
        with replacing(job.run_dir / "without_gates.txt") as temporary:
            temporary.write_text(text)
        print(f"\n{text}", flush=True)


def evaluate_control(job: Job, pool: ExpertPool) -> list[RouterResult]:
    """The routers of ``evaluate.routers`` that look at the query, over another pool; named ``ROUTER, random``."""
    kinds = [kind for kind in job.cfg.evaluate.routers if STRATEGIES[kind].static is None]
    queries = make_queries(job.tasks.all, "test", job.cfg.evaluate.queries, job.collator, pool.names)
    router = global_router(job, pool)
    attach_pool(job.frozen.model, pool, dataclasses.replace(job.cfg.router, kind="base"))
    try:
        found = [evaluate_router(job, pool, kind, queries, router)[0] for kind in kinds]
    finally:
        detach(job.frozen.model)
    return [dataclasses.replace(result, router=f"{result.router}, random") for result in found]


def _make_control(trained: ExpertPool, path: Path, seed: int) -> None:
    copy_pool(trained, path, lambda name, tensors: randomised(tensors, seed + stable_hash(name)))
    (path / "router").mkdir(exist_ok=True)
    for file in (index.FILE, "calibration.json"):
        shutil.copyfile(trained.router_dir / file, path / "router" / file)


def randomised(tensors: Tensors, seed: int) -> Tensors:
    """Normal random numbers with each tensor's shape, dtype and root mean square."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    made = {}
    for key, value in sorted(tensors.items()):
        scale = float(value.double().norm()) / math.sqrt(value.numel())
        made[key] = (torch.randn(value.shape, generator=generator) * scale).to(value.dtype)
    return made


def copy_pool(source: ExpertPool, path: Path, change: Callable[[str, Tensors], Tensors]) -> None:
    """Bring ``path`` up to date: the experts of ``source`` without gates, with ``change(name, tensors)`` for
    weights. Experts made from the same files earlier stay as they are.
    """
    pool = ExpertPool.create(path, source.base, source.fingerprint)
    for name in set(pool.names) - set(source.names):
        pool.remove(name)
    for expert in source.experts():
        card = expert.card()
        made_from = card.get("files", {}).get(WEIGHTS_FILE)
        if expert.name in pool and made_from and pool.expert(expert.name).card().get("made_from") == made_from:
            continue

        def fill(folder: Path, weights: Path = expert.folder / WEIGHTS_FILE) -> None:
            shutil.copyfile(weights.parent / CONFIG_FILE, folder / CONFIG_FILE)
            write_tensors(folder / WEIGHTS_FILE, change(weights.parent.name, load_file(weights)))

        pool.write(expert.name, fill, {**card, "made_from": made_from})
