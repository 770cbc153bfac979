"""The stage ``predict``: answer one text and show which experts served it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from glider_dist.errors import GliderError
from glider_dist.evaluation.queries import QueryRunner
from glider_dist.evaluation.routers import router_scope
from glider_dist.job import Job
from glider_dist.model.attach import detach, routing_stats
from glider_dist.pool import ExpertPool
from glider_dist.routing.strategies import check_router, needs_scores
from glider_dist.semantics.global_router import global_router
from glider_dist.tasks.prompt import prompt
from glider_dist.tasks.record import check_text

SHOWN = 3


@dataclass(frozen=True)
class Prediction:
    """An answer, and the share of (token, site) pairs each expert served, largest first."""

    answer: str
    served: list[tuple[str, float]]
    cosines: dict[str, float]


def split_text(text: str) -> tuple[str, str | None]:
    """A typed text as instruction and input: ``INSTRUCTION Input: INPUT``, else all of it is the instruction."""
    instruction, *given = re.split(r"\s*\bInput:\s*", text.strip(), maxsplit=1)
    return instruction, given[0] if given else None


def predict(job: Job, pool: ExpertPool, text: str) -> Prediction:
    """Answer ``text`` with the configured router.

    Raises:
        GliderError: an empty text, or a router that cannot answer a query of an unknown task (oracle).
    """
    if not text.strip():
        raise GliderError("there is no text to answer")
    check_text(text, "the text to answer")
    if check_router(job.cfg.router, len(pool)).static == "assigned":
        raise GliderError("router.kind=oracle needs to know the query's task; choose another router for predict")
    instruction, given = split_text(text)
    similarity = None
    if needs_scores(job.cfg.router):
        similarity = global_router(job, pool).similarity([instruction])
    model = job.attach(pool, job.cfg.router)
    try:
        runner = QueryRunner(job.frozen, job.collator, 1)
        scope = router_scope(model, job.cfg.router, similarity, None)
        encoded = job.collator.encode(prompt(instruction, given))
        answer = runner.answers([encoded], job.cfg.evaluate.max_new_tokens, scope)[0]
        total = torch.zeros(len(pool))
        for counts in routing_stats(model).values():
            total += counts if len(counts) == len(pool) else 0
    finally:
        detach(model)
    share = total / total.sum().clamp_min(1)
    order = share.argsort(descending=True, stable=True).tolist()
    served = [(pool.names[i], float(share[i])) for i in order if share[i] > 0]
    cosines = {} if similarity is None else dict(zip(pool.names, similarity[0].tolist(), strict=True))
    return Prediction(answer.strip().split("\n")[0], served, cosines)


def run(job: Job, text: str = "") -> None:
    """Print the answer and the experts that served it."""
    prediction = predict(job, job.open_pool(), text)
    if job.ranks.is_main:
        print(show(text, prediction), flush=True)


def show(text: str, prediction: Prediction) -> str:
    """A few lines: query, answer, and the experts that served most of the (token, layer) pairs."""
    lines = [f"query:  {text}", f"answer: {prediction.answer}"]
    for name, share in prediction.served[:SHOWN]:
        cosine = prediction.cosines.get(name)
        near = "" if cosine is None else f", description cosine {cosine:.2f}"
        lines.append(f"  {name}: {share:.0%} of the routed tokens{near}")
    return "\n".join(lines)
