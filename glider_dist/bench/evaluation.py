"""``glider-dist bench evaluate``: what routing adds to the time of an evaluation.

The same queries are answered by the base alone and by each router in turn, several times, in one process per
rank; every answer has exactly ``evaluate.max_new_tokens`` tokens, so that all do the same number of steps. Queries
are embedded beforehand, which is not counted; ``evaluate`` does it beside the batches before.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

from glider_dist.evaluation.queries import QueryRunner, make_queries
from glider_dist.evaluation.routers import router_scope
from glider_dist.job import Job
from glider_dist.model.attach import detach, set_router
from glider_dist.pool.files import write_json
from glider_dist.semantics.global_router import global_router

REPEATS = 3


def run(job: Job) -> None:
    """Print seconds per query of ``evaluate.routers`` (less the oracle) and their ratios to the base alone."""
    pool, cfg = job.open_pool(), job.cfg
    routers = ["base", *(kind for kind in cfg.evaluate.routers if kind not in ("base", "oracle"))]
    queries = make_queries(job.tasks.all, "test", cfg.evaluate.queries, job.collator, pool.names)
    mine = queries[job.ranks.rank :: job.ranks.world]
    similarity = global_router(job, pool).similarity([query.instruction for query in mine])
    runner = QueryRunner(job.frozen, job.collator, cfg.evaluate.batch_size)
    model = job.attach(pool, dataclasses.replace(cfg.router, kind="phatgoose"))
    seconds: dict[str, list[float]] = {kind: [] for kind in routers}
    try:
        for repeat in range(-1, REPEATS):
            for kind in routers:
                router = dataclasses.replace(cfg.router, kind=kind)
                set_router(model, router, pool)
                scope = router_scope(model, router, similarity, None)
                # The round before the first warms up, on a few queries.
                chosen = mine if repeat >= 0 else mine[: cfg.evaluate.batch_size]
                job.ranks.barrier()
                started = time.perf_counter()
                encoded = [query.encoded for query in chosen]
                runner.answers(encoded, cfg.evaluate.max_new_tokens, scope, same_length=True)
                elapsed = max(job.ranks.gather(time.perf_counter() - started))
                if repeat >= 0:
                    seconds[kind].append(elapsed)
    finally:
        detach(model)
    if not job.ranks.is_main:
        return
    base = statistics.median(seconds["base"])
    print(
        f"{len(queries)} queries of {cfg.evaluate.max_new_tokens} tokens, {len(pool)} experts, "
        f"{job.ranks.world} ranks, batches of {cfg.evaluate.batch_size}, {job.base.dtype}, {REPEATS} rounds"
    )
    print(f"{'router':10} {'s/query':>8} {'over base':>10}")
    for kind, values in seconds.items():
        median = statistics.median(values)
        print(f"{kind:10} {median / len(queries):8.4f} {median / base:9.2f}x")
    record = {"queries": len(queries), "experts": len(pool), "seconds": seconds}
    write_json(job.run_dir / "bench_evaluate.json", record)
