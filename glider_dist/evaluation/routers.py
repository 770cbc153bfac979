"""One row of the table: a router's answers to all queries, shared out over the ranks."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.evaluation.choices import rank_choices
from glider_dist.evaluation.hindsight import hindsight_experts
from glider_dist.evaluation.metrics import score
from glider_dist.evaluation.partial import PartialRow
from glider_dist.evaluation.queries import Query, QueryRunner, Scope, no_scope
from glider_dist.evaluation.report import QueryResult, RouterResult
from glider_dist.job import Job
from glider_dist.model.attach import (
    assign_experts,
    query_scores,
    reset_routing_stats,
    routing_stats,
    set_router,
)
from glider_dist.pool import ExpertPool
from glider_dist.routing.strategies import needs_scores, strategy_of
from glider_dist.semantics.global_router import Ahead, GlobalRouter

log = logging.getLogger(__name__)
T = TypeVar("T")


def router_scope(
    model: Any, router: RouterConfig, similarity: torch.Tensor | Ahead | None, experts: torch.Tensor | None
) -> Scope:
    """The context of a batch under a router: its similarities, or its assigned experts, or nothing.

    Args:
        similarity: ``[queries, E]``, needed where :func:`needs_scores` says so.
        experts: ``[queries]``, needed by the oracle.
    """
    if needs_scores(router):
        assert similarity is not None
        cosines = similarity if isinstance(similarity, Ahead) else _row_at_least(similarity)
        return lambda chosen: query_scores(model, cosines[list(chosen)])
    if strategy_of(router).static == "assigned":
        assert experts is not None
        ids = _row_at_least(experts)
        return lambda chosen: assign_experts(model, ids[list(chosen)])
    return no_scope


def _row_at_least(rows: torch.Tensor) -> torch.Tensor:
    """A rank without queries keeps in step with the others by a dummy query, which needs a row, too."""
    return rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])


def evaluate_router(
    job: Job,
    pool: ExpertPool,
    kind: str,
    queries: Sequence[Query],
    router: GlobalRouter | None,
    partial: PartialRow | None = None,
) -> tuple[RouterResult, dict[str, Any]]:
    """Answer and score all queries under one router.

    Args:
        partial: answers of earlier starts, and where those of this one go.

    Returns:
        The result (the same on every rank), and what the routers did: tokens per expert over all sites.

    Raises:
        Stopped: the job was asked to; the answers so far are in ``partial``.
    """
    model, cfg = job.frozen.model, job.cfg
    used = replace(cfg.router, kind=kind)
    set_router(model, used, pool)
    runner = QueryRunner(job.frozen, job.collator, cfg.evaluate.batch_size, job.stop)
    experts = hindsight_experts(job, queries, runner, len(pool)) if kind == "oracle" else None
    mine = list(range(job.ranks.rank, len(queries), job.ranks.world))
    if router is not None and needs_scores(used):
        # Loading the embedder is not part of a query's time.
        router.embedder.embed(["warm up"])
    job.ranks.barrier()
    with contextlib.ExitStack() as ended:
        started = time.perf_counter()
        similarity, before = None, {}
        if needs_scores(used):
            if router is None:
                raise GliderError(f"router {kind!r} needs the index of the pool; run index first")
            before = dict(router.seconds)
            batches = list(runner.batches([queries[i].encoded for i in mine]))
            similarity = ended.enter_context(Ahead(router, [queries[i].instruction for i in mine], batches))
        own = experts[mine] if experts is not None else None
        scope = router_scope(model, used, similarity, own)
        reset_routing_stats(model)

        def note(found: dict[int, str]) -> None:
            if partial is not None:
                partial.answered({mine[place]: text for place, text in found.items()}, _tokens(model, pool))

        texts = runner.answers(
            [queries[i].encoded for i in mine],
            cfg.evaluate.max_new_tokens,
            scope,
            known=_places(mine, partial.texts if partial is not None else {}),
            on_batch=note,
        )
        if partial is not None:
            partial.save()
        job.stop.agree(runner.broke_off)
        seconds = max(job.ranks.gather(time.perf_counter() - started)) + (partial.seconds if partial else 0.0)
        waited = similarity.waited if similarity is not None else 0.0
        choices: list[int | None] = [None] * len(mine)
        if cfg.evaluate.rank_classification:
            choices = _choices(job, pool, [queries[i] for i in mine], mine, scope, partial)
        latency = {"model": seconds}
        scores = None
        if similarity is not None and router is not None:
            scores = similarity.all()
            latency = _latency(job, router, before, waited, seconds)
        rows = []
        for place, i in enumerate(mine):
            first = None
            if scores is not None and queries[i].owner is not None:
                first = int(scores[place].argmax()) == queries[i].owner
            rows.append((i, _result(queries[i], texts[place], choices[place], first)))
        everything = dict(row for rows in job.ranks.gather(rows) for row in rows)
        result = RouterResult(kind, tuple(everything[i] for i in range(len(queries))), seconds, made_with(job))
        return result, {**_routing(job, model, pool, partial), "seconds": latency}


def _choices(
    job: Job,
    pool: ExpertPool,
    queries: Sequence[Query],
    mine: Sequence[int],
    scope: Scope,
    partial: PartialRow | None,
) -> list[int | None]:
    """The likeliest choices of this rank's queries; raises Stopped with those so far in ``partial``."""
    model = job.frozen.model

    def note(found: dict[int, int]) -> None:
        if partial is not None:
            partial.chose({mine[place]: choice for place, choice in found.items()}, _tokens(model, pool))

    chosen = rank_choices(
        model,
        job.collator,
        queries,
        job.cfg.evaluate.batch_size,
        scope,
        _places(mine, partial.choices if partial is not None else {}),
        note,
        lambda: job.stop.wished,
    )
    if partial is not None:
        partial.save()
    job.stop.agree(any(query.example.choices and one is None for query, one in zip(queries, chosen, strict=True)))
    return chosen


def _places(mine: Sequence[int], found: Mapping[int, T]) -> dict[int, T]:
    """What was found for the queries at ``mine``, by their places there."""
    return {place: found[i] for place, i in enumerate(mine) if i in found}


def made_with(job: Job) -> dict[str, Any]:
    """What an answer may depend on by rounding, and its time by much, beside what it is an answer to."""
    cfg = job.cfg
    return {
        "ranks": job.ranks.world,
        "batch_size": cfg.evaluate.batch_size,
        "expert_parallel": cfg.mesh.expert_parallel,
        "dispatch": cfg.dispatch if cfg.mesh.expert_parallel > 1 else None,
        # The others shard what only training has.
        "zero_stage": 3 if cfg.zero_stage == 3 else 0,
    }


def _latency(
    job: Job, router: GlobalRouter, before: dict[str, float], waited: float, seconds: float
) -> dict[str, float]:
    """Seconds of the slowest rank for each part; all but ``waiting`` and ``model`` run a batch ahead."""
    spent = {**{key: value - before[key] for key, value in router.seconds.items()}, "waiting": waited}
    ranks = job.ranks.gather(spent)
    parts = {key: round(max(each[key] for each in ranks), 6) for key in spent}
    parts["model"] = round(seconds - parts["waiting"], 6)
    if job.ranks.is_main:
        log.info("seconds: %s", ", ".join(f"{key} {value:.3f}" for key, value in parts.items()))
    plain = sum(job.ranks.gather(router.describer.plain if router.describer is not None else 0))
    return {**parts, "queries_without_description": plain}


def _result(query: Query, text: str, choice: int | None, own_first: bool | None) -> QueryResult:
    example = query.example
    right = None
    if choice is not None and example.choices is not None:
        right = float(example.choices[choice] in example.targets)
    return QueryResult(
        task=query.task.name,
        id=example.id,
        split=query.task.split,
        score=score(query.task.metric, text, example.targets),
        prediction=text,
        target=example.target,
        own_first=own_first,
        choice_score=right,
    )


def _tokens(model: Any, pool: ExpertPool) -> torch.Tensor:
    """This rank's tokens per expert ``[E]``, over all sites."""
    total = torch.zeros(len(pool), dtype=torch.int64)
    for counts in routing_stats(model).values():
        if len(counts) == len(pool):
            total += counts
    return total


def _routing(job: Job, model: Any, pool: ExpertPool, partial: PartialRow | None) -> dict[str, Any]:
    total = torch.stack(job.ranks.gather(_tokens(model, pool))).sum(0)
    if partial is not None:
        total += partial.tokens
    share = total.double() / total.sum().clamp_min(1)
    entropy = float(-(share * share.clamp_min(1e-300).log2()).sum())
    return {
        "tokens_per_expert": dict(zip(pool.names, total.tolist(), strict=True)),
        "entropy_bits": round(entropy, 4),
    }


def router_settings(router: RouterConfig) -> dict[str, Any]:
    """What of a router's settings changes its answers."""
    return {key: value for key, value in vars(router).items() if key != "kind"}
