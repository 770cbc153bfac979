"""The command ``fetch``: bring base, embedder and data sets into the caches, for machines without a network."""

from __future__ import annotations

import logging

from glider_dist.job import Job
from glider_dist.model.base import fetch_base
from glider_dist.semantics.embedder import Embedder

log = logging.getLogger(__name__)


def run(job: Job) -> None:
    """Fetch what the configuration names and is not here yet.

    Raises:
        GliderError: something cannot be found or fetched.
    """
    log.info("base: %s", fetch_base(job.cfg.base))
    Embedder(job.cfg.embedder).load()
    log.info("embedder: %s", job.cfg.embedder)
    examples = sum(len(task.examples(part)) for task in job.tasks.all for part in ("train", "validation", "test"))
    log.info("tasks: %d with %d examples", len(job.tasks.all), examples)
