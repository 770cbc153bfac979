"""The stage ``calibrate``: choose α inside (``alpha_in``), α outside (``alpha_out``) and the threshold between.

Every held-in validation query is scored twice at each candidate α: with its own expert in the pool, as a query
the pool knows, and without it, as one the pool does not know. The three values are those that minimise the mean
loss over both, exactly, by going through all candidates; no test query and no held-out task is looked at.

The loss is 1 - exp(-nll per target token), the chance to miss a token of the answer. In plain nats the queries
whose expert was removed would decide alone: they lose 5 to 6 nats a token whatever α is, so that half a nat among
hopeless answers outweighs right answers lost.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from typing import Any

import numpy as np
import torch

from glider_dist.errors import GliderError
from glider_dist.evaluation.evaluate import calibration_of
from glider_dist.evaluation.queries import QueryRunner, make_queries, queries_digest
from glider_dist.evaluation.routers import router_scope, router_settings
from glider_dist.job import Job
from glider_dist.model.attach import detach, set_router
from glider_dist.pool.calibration import CALIBRATION_FILE, made_for
from glider_dist.pool.files import write_json
from glider_dist.semantics.global_router import global_router, query_settings
from glider_dist.semantics.index import FILE
from glider_dist.tracking.progress import progress

log = logging.getLogger(__name__)


def run(job: Job) -> None:
    """Write ``router/calibration.json``, unless it was made from the same experts, index and settings."""
    cfg = job.cfg
    pool = job.open_pool(check_base=False)
    tasks = [task for task in job.tasks.held_in if task.name in pool]
    if not tasks or len(pool) < 2:
        raise GliderError(
            f"calibration needs a held-in task with an expert in {pool.path}, and at least two experts"
        )
    router = global_router(job, pool)
    index = pool.router_dir / FILE
    state = {
        "files": {expert.name: expert.card().get("files", {}) for expert in pool.experts()},
        "index": hashlib.sha256(index.read_bytes()).hexdigest(),
        "settings": dataclasses.asdict(cfg.calibrate),
        "queries": [queries_digest(tasks, "validation", cfg.calibrate.queries), cfg.tasks.max_length],
        "router": router_settings(dataclasses.replace(cfg.router, **_UNSET)),
        **query_settings(job),
    }
    key = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    if calibration_of(pool).get("key") == key:
        if job.ranks.is_main:
            log.info("the calibration is up to date")
        return
    pool.check_base(job.fingerprint)
    queries = make_queries(tasks, "validation", cfg.calibrate.queries, job.collator, pool.names)
    # Each rank asks for its share, and all get everything.
    shares = job.ranks.gather(
        router.similarity([query.instruction for query in queries[job.ranks.rank :: job.ranks.world]])
    )
    similarity = torch.empty(len(queries), len(pool))
    for rank, share in enumerate(shares):
        similarity[rank :: job.ranks.world] = share
    without = similarity.clone()
    without[torch.arange(len(queries)), torch.tensor([query.owner for query in queries])] = float("-inf")
    both = torch.cat([similarity, without])
    encoded = [query.encoded for query in queries] * 2

    mine = list(range(job.ranks.rank, len(encoded), job.ranks.world))
    model = job.attach(pool, dataclasses.replace(cfg.router, kind="glider", **_fixed(1.0)))
    runner = QueryRunner(job.frozen, job.collator, cfg.evaluate.batch_size, job.stop)
    losses = np.zeros((len(cfg.calibrate.alphas), len(encoded)))
    try:
        for place, alpha in enumerate(progress(cfg.calibrate.alphas, desc="alphas", enabled=job.ranks.is_main)):
            fixed = dataclasses.replace(cfg.router, kind="glider", **_fixed(alpha))
            set_router(model, fixed)
            scope = router_scope(model, fixed, both[mine], None)
            losses[place, mine] = runner.nll([encoded[i] for i in mine], scope).numpy()  # nats per token
            job.stop.agree(runner.broke_off)
    finally:
        detach(model)
    nll = np.sum(job.ranks.gather(losses), axis=0)
    losses = 1 - np.exp(-nll)
    best = both.amax(1).numpy().astype(np.float64)
    chosen = choose(losses, best, cfg.calibrate.alphas)
    if job.ranks.is_main:
        write_json(
            pool.router_dir / CALIBRATION_FILE,
            {
                **chosen,
                "key": key,
                "made_for": made_for(pool, index),
                "queries": len(queries),
                "embedder": cfg.embedder,
                "mean_loss": _mean_losses(losses, cfg.calibrate.alphas),
                "mean_nll": _mean_losses(nll, cfg.calibrate.alphas),
                "best_cosine": {
                    "own_present": _spread(best[: len(queries)]),
                    "own_removed": _spread(best[len(queries) :]),
                },
            },
        )
        job.run.log({f"calibrate/{name}": value for name, value in chosen.items()})
        log.info("calibrated on %d queries: %s", len(queries), chosen)
    job.ranks.barrier()


_UNSET: dict[str, Any] = {"alpha_in": None, "alpha_out": None, "threshold": None}


def _fixed(alpha: float) -> dict[str, Any]:
    return {"alpha_in": alpha, "alpha_out": alpha, "threshold": 0.0}


def choose(losses: np.ndarray, best_cosine: np.ndarray, alphas: list[float]) -> dict[str, float]:
    """The α inside, α outside and threshold with the least mean loss.

    Thresholds that differ from the best one by less than one standard error of the difference fit as well; of
    these the one in the middle of the range is taken, since new wordings move cosines either way.

    Args:
        losses: ``[len(alphas), N]`` loss of each query (own expert present, then removed) at each α.
        best_cosine: ``[N]`` each query's largest cosine.

    Returns:
        ``{"alpha_in", "alpha_out", "threshold", "loss"}``; ``alpha_in >= alpha_out``.
    """
    values = np.unique(best_cosine)
    candidates = np.concatenate([[values[0] - 0.01], (values[1:] + values[:-1]) / 2, [values[-1] + 0.01]])
    inside = best_cosine[None, :] > candidates[:, None]
    found: tuple[float, int, int] | None = None
    for i in range(len(alphas)):
        for o in range(len(alphas)):
            if alphas[i] >= alphas[o]:
                least = float(np.where(inside, losses[i], losses[o]).mean(1).min())
                if found is None or least < found[0] - 1e-12:
                    found = (least, i, o)
    assert found is not None
    _, i, o = found
    per_query = np.where(inside, losses[i], losses[o])
    mean = per_query.mean(1)
    at = int(mean.argmin())
    excess = per_query - per_query[at]
    error = excess.std(1) / np.sqrt(excess.shape[1])
    fits = candidates[mean - mean[at] <= error]
    threshold = float((fits.min() + fits.max()) / 2)
    return {"alpha_in": alphas[i], "alpha_out": alphas[o], "threshold": threshold, "loss": float(mean[at])}


def _mean_losses(losses: np.ndarray, alphas: list[float]) -> dict[str, list[float]]:
    half = losses.shape[1] // 2
    return {
        "alpha": list(alphas),
        "own_present": [round(float(value), 5) for value in losses[:, :half].mean(1)],
        "own_removed": [round(float(value), 5) for value in losses[:, half:].mean(1)],
    }


def _spread(cosines: np.ndarray) -> dict[str, float]:
    points = np.quantile(cosines, [0.0, 0.1, 0.5, 0.9, 1.0])
    return {
        key: round(float(point), 4) for key, point in zip(("min", "p10", "p50", "p90", "max"), points, strict=True)
    }
