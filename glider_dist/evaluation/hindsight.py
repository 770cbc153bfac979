"""The oracle's experts: a task's own, or for a held-out task the one that fits it best in hindsight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from glider_dist.evaluation.queries import Query, QueryRunner
from glider_dist.job import Job
from glider_dist.model.attach import assign_experts

HINDSIGHT_QUERIES = 16


def hindsight_experts(job: Job, queries: Sequence[Query], runner: QueryRunner, experts: int) -> torch.Tensor:
    """The oracle's choice for each query: its task's own expert, else (held-out) the expert with the lowest mean
    loss on the task's first 16 queries, chosen in hindsight; ``[queries]`` int64.
    """
    model = job.frozen.model
    open_tasks = list(dict.fromkeys(query.task.name for query in queries if query.owner is None))
    probes = {
        name: [query.encoded for query in queries if query.task.name == name][:HINDSIGHT_QUERIES]
        for name in open_tasks
    }
    encoded = [item for name in open_tasks for item in probes[name]]
    losses = {}
    # Every rank takes part in as many rounds, as common forwards need; the last may repeat an expert.
    for turn in range(-(-experts // job.ranks.world)):
        expert = (job.ranks.rank + turn * job.ranks.world) % experts
        losses[expert] = runner.nll(
            encoded,
            lambda chosen, e=expert: assign_experts(model, torch.full((len(chosen),), e)),  # type: ignore[misc]
        )
    job.stop.agree(runner.broke_off)
    table = dict(row for rows in job.ranks.gather(list(losses.items())) for row in rows)
    best: dict[str, int] = {}
    start = 0
    for name in open_tasks:
        stop = start + len(probes[name])
        best[name] = min(range(experts), key=lambda e: float(table[e][start:stop].mean()))
        start = stop
    return torch.tensor([best[q.task.name] if q.owner is None else q.owner for q in queries])
