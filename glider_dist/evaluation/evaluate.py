"""The stage ``evaluate``: every router on the same queries, one table. Rows that are done are not done again."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.evaluation.choices import check_choices
from glider_dist.evaluation.partial import PartialRow
from glider_dist.evaluation.queries import Query, make_queries, queries_digest, warn_of_descriptions
from glider_dist.evaluation.report import (
    SPLITS,
    QueryResult,
    RouterResult,
    mean_score,
    summary_table,
    task_table,
    write_reports,
)
from glider_dist.evaluation.routers import evaluate_router, made_with, router_settings
from glider_dist.job import Job
from glider_dist.model.attach import detach
from glider_dist.pool import ExpertPool
from glider_dist.pool.calibration import stored_calibration
from glider_dist.pool.files import digest_of, read_json, sha256, write_json
from glider_dist.routing.strategies import check_router, check_shared, needs_scores, strategy_of
from glider_dist.semantics.global_router import global_router, query_settings
from glider_dist.semantics.index import FILE
from glider_dist.tracking.progress import progress

log = logging.getLogger(__name__)


def run(job: Job) -> list[RouterResult]:
    """Evaluate ``evaluate.routers`` on the test queries of all tasks; prints the table and writes the reports."""
    cfg = job.cfg
    pool = job.open_pool(check_base=False)
    check_stage(cfg, len(pool), job.ranks.world)
    tasks = job.tasks.all
    lacking = [task.name for task in job.tasks.held_in if task.name not in pool]
    # A pool may be of other tasks altogether, or hold the multitask baseline; one that lacks a few is unfinished.
    if lacking and len(lacking) < len(job.tasks.held_in):
        raise GliderError(f"pool {pool.path} has no expert for the held-in task {lacking[0]!r}; run train-experts")
    known = [task.name for task in job.tasks.held_out if task.name in pool]
    if known and job.ranks.is_main:
        log.warning(
            "held-out task %r has an expert in pool %s (%d of %d do), so these scores are not of unseen tasks",
            known[0], pool.path, len(known), len(job.tasks.held_out),
        )  # fmt: skip
    key = rows_key(job, pool)
    rows = job.run_dir / "rows"
    todo = [kind for kind in cfg.evaluate.routers if _stored(rows / f"{kind}.json", key) is None]
    if todo:
        pool.check_base(job.fingerprint)
        queries = make_queries(tasks, "test", cfg.evaluate.queries, job.collator, pool.names)
        if cfg.evaluate.rank_classification:
            check_choices(job.collator, queries)
        _run_rows(job, pool, queries, todo, rows, key)
    job.ranks.barrier()
    stored = [_stored(rows / f"{kind}.json", key) for kind in cfg.evaluate.routers]
    results = [row[0] for row in stored if row is not None]
    if job.ranks.is_main:
        routing = {row[0].router: row[1] for row in stored if row is not None}
        extra = {
            "routing": routing,
            "pool": str(pool.path),
            "seed": cfg.seed,
            "calibration": stored_calibration(pool),
        }
        write_reports(job.run_dir, results, extra, cfg.evaluate.bootstrap, cfg.seed)
        _track(job, results)
        print(f"\n{report(job, results)}", flush=True)
    return results


def check_stage(cfg: Config, experts: int, world: int) -> None:
    """Raises GliderError if the stage cannot run as configured over so many experts and ranks."""
    for kind in cfg.evaluate.routers:
        check_router(dataclasses.replace(cfg.router, kind=kind), experts)
        if cfg.mesh.expert_parallel > 1:
            check_shared(dataclasses.replace(cfg.router, kind=kind))
    if not cfg.evaluate.routers:
        raise GliderError("evaluate.routers is empty; name at least one router")
    if len(set(cfg.evaluate.routers)) != len(cfg.evaluate.routers):
        raise GliderError("evaluate.routers names a router twice")
    together = cfg.zero_stage == 3 or cfg.mesh.expert_parallel > 1
    if cfg.evaluate.rank_classification and together and world > 1:
        raise GliderError(
            "evaluate.rank_classification needs zero_stage=0 and mesh.expert_parallel=1: ranks have different "
            "numbers of choices"
        )


def report(job: Job, results: list[RouterResult]) -> str:
    """Scores per task, the table of routers, and where the run is."""
    table = summary_table(results, job.cfg.evaluate.bootstrap, job.cfg.seed)
    return f"{task_table(results)}\n{table}Run directory: {job.run_dir}"


def _run_rows(job: Job, pool: ExpertPool, queries: list[Query], todo: list[str], rows: Path, key: str) -> None:
    cfg = job.cfg.evaluate
    routers = [dataclasses.replace(job.cfg.router, kind=kind) for kind in todo]
    needs_index = any(needs_scores(router) for router in routers)
    needs_gates = any(strategy_of(router).local == "gate" for router in routers)
    router = global_router(job, pool) if needs_index else None
    if router is not None and job.ranks.is_main:
        warn_of_descriptions(queries, router.descriptions)
    first = dataclasses.replace(job.cfg.router, kind="phatgoose" if needs_gates else "base")
    model = job.attach(pool, first)
    try:
        done = len(cfg.routers) - len(todo)
        for kind in progress(todo, desc="routers", enabled=job.ranks.is_main):
            job.run.progress("rows", done, len(cfg.routers))
            made = f"{key}/{made_with(job)}"
            partial = PartialRow(rows / "partial", kind, made, job.ranks, len(pool), cfg.save_minutes)
            result, routing = evaluate_router(job, pool, kind, queries, router, partial)
            _check_unchanged(job, key)
            if job.ranks.is_main:
                plain = {"key": key, "result": dataclasses.asdict(result), "routing": routing}
                write_json(rows / f"{kind}.json", plain)
                scores = {split: mean_score(result, split) for split in SPLITS}
                said = ", ".join(f"{split} {score:.3f}" for split, score in scores.items() if score is not None)
                log.info("%s: %s, %d queries in %.0f s", kind, said, len(result.queries), result.seconds)
                partial.remove()
            done += 1
            job.run.progress("rows", done, len(cfg.routers))
            job.stop.agree(job.stop.wished and kind != todo[-1])
    finally:
        detach(model)


def _check_unchanged(job: Job, key: str) -> None:
    """Raises GliderError on all ranks if the pool is not what it was: whose answers are these?"""

    def check() -> None:
        if rows_key(job, job.open_pool(check_base=False)) != key:
            raise GliderError(
                f"pool {job.pool_path} was changed while it was evaluated, so that this row fits neither state; "
                "start evaluate again for the pool as it is now"
            )

    job.ranks.on_main(check)


def rows_key(job: Job, pool: ExpertPool) -> str:
    """Everything the answers depend on: experts, gates, index, calibration, queries and settings."""
    cfg = job.cfg
    index = pool.router_dir / FILE
    state = {
        "base": pool.fingerprint.to_json(),
        "files": pool.files(),
        "index": sha256(index) if index.exists() else None,
        "calibration": stored_calibration(pool),
        "queries": queries_digest(job.tasks.all, "test", cfg.evaluate.queries),
        "max_length": cfg.tasks.max_length,
        "router": router_settings(cfg.router),
        "evaluate": {
            **dataclasses.asdict(cfg.evaluate),
            "routers": None,
            "bootstrap": None,
            "batch_size": None,
            "save_minutes": None,
        },
        "computed_in": job.computes_in,
        **query_settings(job),
    }
    return digest_of(state)


def _stored(path: Path, key: str) -> tuple[RouterResult, dict[str, Any]] | None:
    if not path.exists():
        return None
    try:
        value = read_json(path)
        if value.get("key") != key:
            return None
        plain = value["result"]
        queries = tuple(QueryResult(**query) for query in plain["queries"])
        return RouterResult(plain["router"], queries, plain["seconds"], plain["made_with"]), value["routing"]
    except (GliderError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s) and made again", path, error)
        return None


def _track(job: Job, results: list[RouterResult]) -> None:
    table = []
    for result in results:
        means = {split: mean_score(result, split) for split in SPLITS}
        table.append([result.router, *means.values(), result.seconds / max(len(result.queries), 1)])
        job.run.log({f"evaluate/{result.router}/{split}": m for split, m in means.items() if m is not None})
    job.run.table("evaluation", ["router", *SPLITS, "seconds_per_query"], table)
