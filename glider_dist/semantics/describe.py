"""The stage ``describe``: one or several sentences about what each expert does, written into its card."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from glider_dist.errors import GliderError
from glider_dist.pool import ExpertPool

if TYPE_CHECKING:
    from glider_dist.job import Job
    from glider_dist.tasks.task import Task

log = logging.getLogger(__name__)


def descriptions_of(pool: ExpertPool) -> dict[str, list[str]]:
    """``{expert: descriptions}`` from the cards, in the pool's order."""
    return {expert.name: list(expert.card().get("descriptions", [])) for expert in pool.experts()}


def describe_task(task: Task) -> tuple[list[str], str]:
    """The task's own descriptions, else its definition; and which of the two it was.

    Raises:
        GliderError: if it has neither.
    """
    if task.descriptions:
        return list(task.descriptions), "task descriptions"
    if task.definition.strip():
        return [task.definition], "task definition"
    raise GliderError(f"task {task.name!r} has neither descriptions nor a definition; add one to tasks.json")


def run(job: Job) -> None:
    """Describe every expert that has no description yet.

    Raises:
        GliderError: if no configured task has an undescribed expert's name, or that task has no text.
    """
    pool = job.open_pool(check_base=False)
    by_name = {task.name: task for task in job.tasks.all}
    todo = [expert for expert in pool.experts() if not expert.card().get("descriptions")]
    texts = {}
    for expert in todo:
        if expert.name not in by_name:
            raise GliderError(f"expert {expert.name!r} has no description, and no task of that name is configured")
        texts[expert.name] = describe_task(by_name[expert.name])
    if job.ranks.is_main:
        for expert in todo:
            sentences, source = texts[expert.name]
            expert.update_card(descriptions=sentences, description_source=source)
        job.run.log({"describe/experts": len(todo)})
        log.info("described %d of %d experts", len(todo), len(pool))
    job.ranks.barrier()
