"""The command ``fetch``: bring base, embedder and data sets into the caches, for machines without a network."""

from __future__ import annotations

import logging

from glider_dist.job import Job
from glider_dist.model.base import fetch_base
from glider_dist.semantics.embedder import Embedder
from glider_dist.tasks.task import PARTS

log = logging.getLogger(__name__)


def run(job: Job) -> None:
    """Fetch what the configuration names and is not here yet.

    Raises:
        GliderError: something cannot be found or fetched.
    """
    log.info("base: %s", fetch_base(job.cfg.base))
    Embedder(job.cfg.embedder).load()
    log.info("embedder: %s", job.cfg.embedder)
    held_in, held_out = job.tasks.held_in, job.tasks.held_out
    examples = sum(len(task.examples(part)) for task in held_in for part in PARTS)
    # Nothing is trained on those, and they may have nothing else.
    examples += sum(len(task.examples("test")) for task in held_out)
    log.info("tasks: %d with %d examples", len(held_in) + len(held_out), examples)
