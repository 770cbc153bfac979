"""The stage ``calibrate``: choose α inside (``alpha_in``), α outside (``alpha_out``) and the threshold between.

Every held-in validation query is scored twice at each candidate α: with its own expert in the pool, as a query
the pool knows, and without it, as one the pool does not know. The three values are those that minimise the mean
loss over both, by going through all candidates, and where these queries do not decide, those nearest to the
published ones; no test query and no held-out task is looked at.

The loss is 1 - exp(-nll per target token), the chance to miss a token of the answer. In plain nats the queries
whose expert was removed would decide alone: they lose 5 to 6 nats a token whatever α is, so that half a nat among
hopeless answers outweighs right answers lost.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.evaluation.partial import PartialLosses
from glider_dist.evaluation.queries import QueryRunner, make_queries, queries_digest, warn_of_descriptions
from glider_dist.evaluation.routers import router_scope, router_settings
from glider_dist.job import Job
from glider_dist.model.attach import detach, set_router
from glider_dist.pool.calibration import CALIBRATION_FILE, calibrated_files, made_for, stored_calibration
from glider_dist.pool.files import digest_of, sha256, write_json
from glider_dist.routing.strategies import PUBLISHED, local_scores, strategy_of
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
        "files": calibrated_files(pool),
        "index": sha256(index),
        "settings": dataclasses.asdict(cfg.calibrate),
        "rule": "of the pairs within one standard error the one nearest to the published, a threshold that fits",
        "queries": [queries_digest(tasks, "validation", cfg.calibrate.queries), cfg.tasks.max_length],
        "router": router_settings(dataclasses.replace(cfg.router, **_UNSET)),
        **query_settings(job),
    }
    key = digest_of(state)
    if stored_calibration(pool).get("key") == key:
        if job.ranks.is_main:
            log.info("the calibration is up to date")
        return
    pool.check_base(job.fingerprint)
    queries = make_queries(tasks, "validation", cfg.calibrate.queries, job.collator, pool.names)
    if job.ranks.is_main:
        warn_of_descriptions(queries, router.descriptions)
    # Queries times experts is much for one rank: each has its own queries alone, with their experts and without.
    share = list(range(job.ranks.rank, len(queries), job.ranks.world))
    mine = [*share, *(len(queries) + i for i in share)]
    similarity = router.similarity([queries[i].instruction for i in share])
    without = similarity.clone()
    owners = torch.tensor([queries[i].owner for i in share], dtype=torch.int64)
    without[torch.arange(len(share)), owners] = float("-inf")
    both = torch.cat([similarity, without])
    encoded = [queries[i].encoded for i in share] * 2

    def of_all(values: np.ndarray) -> np.ndarray:
        """``[N]`` from every rank's values of its queries, with their experts and then without."""
        values_N = np.zeros(2 * len(queries))
        values_N[mine] = values
        total: np.ndarray = np.sum(job.ranks.gather(values_N), axis=0)
        return total

    glider = dataclasses.replace(cfg.router, kind="glider")
    model = job.attach(pool, dataclasses.replace(glider, **_fixed(1.0)))
    runner = QueryRunner(job.frozen, job.collator, cfg.evaluate.batch_size, job.stop)
    # Another dtype may have been calibrated for, too, but losses of two are not compared.
    kept = PartialLosses(job.run_dir / "calibrate.json", f"{key}/{job.computes_in}", job.ranks)
    try:
        for alpha in progress(cfg.calibrate.alphas, desc="alphas", enabled=job.ranks.is_main):
            if alpha in kept.nll:
                continue
            fixed = dataclasses.replace(glider, **_fixed(alpha))
            set_router(model, fixed)
            nll = runner.nll(encoded, router_scope(model, fixed, both, None)).numpy()  # nats per token
            job.stop.agree(runner.broke_off)
            kept.add(alpha, of_all(nll))
            job.stop.agree(job.stop.wished and len(kept.nll) < len(cfg.calibrate.alphas))
    finally:
        detach(model)
    nll = np.stack([kept.nll[alpha] for alpha in cfg.calibrate.alphas])
    losses = 1 - np.exp(-nll)
    best = of_all(best_cosine(both, pool.names, glider))
    chosen = choose(losses, best, cfg.calibrate.alphas)
    if job.ranks.is_main:
        write_json(
            pool.router_dir / CALIBRATION_FILE,
            {
                **chosen,
                "key": key,
                "made_for": made_for(pool, index),
                "local_scores": local_scores(glider),
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
        found = {name: value for name, value in chosen.items() if name != "tied"}
        job.run.log({f"calibrate/{name}": value for name, value in found.items()})
        log.info("calibrated on %d queries: %s", len(queries), found)
        kept.remove()
    job.ranks.barrier()


def best_cosine(similarity_NE: torch.Tensor, names: Sequence[str], router: RouterConfig) -> np.ndarray:
    """``[N]`` fp64, over the experts that a query may choose, as the router takes it; -1 if there is none."""
    if strategy_of(router).by_weights and router.general:
        general = torch.tensor([names.index(name) for name in router.general])
        similarity_NE = similarity_NE.index_fill(1, general, float("-inf"))
    return similarity_NE.amax(1).clamp_min(-1.0).numpy().astype(np.float64)


_UNSET: dict[str, Any] = {"alpha_in": None, "alpha_out": None, "threshold": None}


def _fixed(alpha: float) -> dict[str, Any]:
    return {"alpha_in": alpha, "alpha_out": alpha, "threshold": 0.0}


def choose(losses: np.ndarray, best_cosine: np.ndarray, alphas: Sequence[float]) -> dict[str, Any]:
    """The α inside, α outside and threshold with the least mean loss, as far as these queries can tell.

    Pairs of α that lose by at most one standard error of the difference fit as well as the best one. Of these
    the pair nearest to the published 100 and 3 is taken (sum of the distances in log α): on a few dozen queries
    the least loss alone is a matter of rounding. Of the thresholds that fit as well, the middle of their range is
    taken, since new wordings move cosines either way; if it does not fit itself, the nearest that does.

    Args:
        losses: ``[len(alphas), N]`` loss of each query (own expert present, then removed) at each α.
        best_cosine: ``[N]`` each query's largest cosine.

    Returns:
        ``{"alpha_in", "alpha_out", "threshold", "loss", "tied"}``; ``alpha_in >= alpha_out``; ``loss`` is the mean
        of these three; ``tied`` lists all pairs that fit as well.
    """
    # By cosine, so that a threshold cuts the queries in two and sums up to the cut give its mean: no [N, N].
    order = np.argsort(best_cosine, kind="stable")
    losses = losses[:, order]
    values, first = np.unique(best_cosine[order], return_index=True)
    candidates = np.concatenate([[values[0] - 0.01], (values[1:] + values[:-1]) / 2, [values[-1] + 0.01]])
    cuts = np.append(first, len(order))
    pairs = {}
    for high, outer in itertools.product(range(len(alphas)), repeat=2):
        if alphas[high] >= alphas[outer]:
            # Rounded, as equal means may differ by what their sums round.
            place = _means(losses[outer], losses[high], cuts).round(12).argmin()
            of_queries = np.concatenate([losses[outer, : cuts[place]], losses[high, cuts[place] :]])
            pairs[float(alphas[high]), float(alphas[outer])] = of_queries
    best = min(pairs.values(), key=lambda of_queries: of_queries.mean().round(12))
    tied = [pair for pair, of_queries in pairs.items() if _fits(of_queries - best)]
    tied.sort(key=_from_published)
    of_queries = pairs[tied[0]]
    inside, outside = (losses[alphas.index(alpha)] - of_queries for alpha in tied[0])
    mean = _means(outside, inside, cuts)
    variance = (_means(outside**2, inside**2, cuts) - mean**2).clip(0)
    thresholds = candidates[mean <= np.sqrt(variance / len(order))]
    threshold = (thresholds.min() + thresholds.max()) / 2
    excess = np.where(best_cosine[order] > threshold, inside, outside)
    if not _fits(excess):
        threshold = thresholds[np.abs(thresholds - threshold).argmin()]
        excess = np.where(best_cosine[order] > threshold, inside, outside)
    return {
        "alpha_in": tied[0][0],
        "alpha_out": tied[0][1],
        "threshold": float(threshold),
        "loss": float((of_queries + excess).mean()),
        "tied": [list(pair) for pair in tied],
    }


def _means(outside: np.ndarray, inside: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """The mean over ``[N]`` queries of ``outside`` before each cut and ``inside`` from it on; ``[len(cuts)]``."""
    before, up_to = (np.concatenate([[0.0], np.cumsum(values)]) for values in (outside, inside))
    return np.asarray((before[cuts] + up_to[-1] - up_to[cuts]) / len(inside))


def _fits(excess: np.ndarray) -> bool:
    """Whether losses that exceed those of the best choice by ``[N]`` do so by at most one standard error."""
    return bool(excess.mean() <= excess.std() / np.sqrt(len(excess)))


def _from_published(pair: tuple[float, float]) -> float:
    published = PUBLISHED["alpha_in"], PUBLISHED["alpha_out"]
    # α may be 0: no global score at all.
    return sum(abs(math.log(max(a, 1e-3) / b)) for a, b in zip(pair, published, strict=True))


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
