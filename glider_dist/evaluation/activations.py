"""The stage ``average-activations``: one pass over each held-in task's training examples, by its own expert.

It writes ``experts/NAME/activation.safetensors``, what the router ``average_activation`` compares tokens with.
Nothing is trained and no answer is scored; the answers are read, since the layers of a decoder see them, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.evaluation.queries import make_queries, queries_digest
from glider_dist.job import Job
from glider_dist.model.activations import average_activations
from glider_dist.model.attach import attach_pool, detach
from glider_dist.model.engine import FORWARD
from glider_dist.model.stored import activations_made_from, write_activations
from glider_dist.pool import ExpertPool
from glider_dist.pool.files import digest_of
from glider_dist.tasks.task import Task
from glider_dist.tracking.progress import progress

log = logging.getLogger(__name__)

EXAMPLES = 1000  # PHATGOOSE's number


def run(job: Job) -> None:
    """Write the mean activations of every expert with a held-in task, unless they are up to date.

    Raises:
        GliderError: if no held-in task has an expert.
    """
    pool = job.open_pool(check_base=False)
    tasks = [task for task in job.tasks.held_in if task.name in pool]
    if not tasks:
        raise GliderError(f"average-activations needs a held-in task with an expert in {pool.path}")
    made_from = {task.name: _digest(job, task) for task in tasks}
    todo = [task for task in tasks if activations_made_from(pool.expert(task.name)) != made_from[task.name]]
    if job.ranks.is_main:
        log.info("%d of %d experts need average activations", len(todo), len(tasks))
    job.ranks.barrier()
    if not todo:
        return
    pool.check_base(job.fingerprint)
    model = attach_pool(job.frozen.model, pool, RouterConfig(kind="base"))
    broke_off = False
    try:
        mine = todo[job.ranks.rank :: job.ranks.world]
        for task in progress(mine, desc="experts", enabled=job.ranks.is_main):
            means = average_activations(model, _batches(job, pool, task), pool.names.index(task.name))
            write_activations(pool.expert(task.name), means, made_from[task.name])
            if broke_off := job.stop.wished and task is not mine[-1]:
                break
        job.frozen.drain(lambda kind: model(**job.collator.dummy().inputs))
    finally:
        detach(model)
    job.stop.agree(broke_off)


def _batches(job: Job, pool: ExpertPool, task: Task) -> Iterator[dict[str, Any]]:
    encoded = [query.encoded for query in make_queries([task], "train", EXAMPLES, job.collator, pool.names)]
    for start in range(0, len(encoded), job.cfg.evaluate.batch_size):
        job.frozen.turn(FORWARD)
        yield job.collator.batch(encoded[start : start + job.cfg.evaluate.batch_size]).inputs


def _digest(job: Job, task: Task) -> str:
    state = [queries_digest([task], "train", EXAMPLES), job.cfg.tasks.max_length, *job.computes_in]
    return digest_of(state)
