"""From tasks to this rank's trainees: examples encoded, recipes checked, work shared out by measured tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.job import Job
from glider_dist.model.batch import Encoded
from glider_dist.tasks.prompt import answer, prompt
from glider_dist.tasks.task import Task
from glider_dist.training.order import share_out
from glider_dist.training.trainee import Recipe, Trainee


def prepare(job: Job, tasks: Sequence[Task], gate: bool) -> list[Trainee]:
    """This rank's share of the tasks, such that all ranks train on about the same number of tokens.

    Each rank reads and encodes a part of the tasks to learn what they cost, and then the ones that it trains.

    Raises:
        GliderError: on all ranks, for the first task whose settings or examples are wrong.
    """
    recipes = {task.name: _recipe(job, task, gate) for task in tasks}
    known: dict[str, Trainee] = {}
    problem = ""
    try:
        for task in tasks[job.ranks.rank :: job.ranks.world]:
            known[task.name] = _trainee(job, task, recipes[task.name])
    except GliderError as error:
        problem = str(error)
    costs: dict[str, float] = {}
    for found, part in job.ranks.gather((problem, {name: trainee.cost for name, trainee in known.items()})):
        if found:
            raise GliderError(found)
        costs |= part
    mine = share_out([costs[task.name] for task in tasks], job.ranks.world)[job.ranks.rank]
    return [known.get(tasks[i].name) or _trainee(job, tasks[i], recipes[tasks[i].name]) for i in mine]


def _recipe(job: Job, task: Task, gate: bool) -> Recipe:
    """The configured recipe with the task's own settings in place of the job's."""
    try:
        train: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(job.cfg.train), task.settings))
        Config(train=train).validate()
    except (GliderError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise GliderError(f"the settings of task {task.name!r} under 'train': {reason}") from None
    return Recipe.of(train, job.cfg.seed, gate)


def _trainee(job: Job, task: Task, recipe: Recipe) -> Trainee:
    validation = _encoded(job, task, "validation", job.cfg.train.eval_examples)
    return Trainee(task.name, _encoded(job, task, "train", None), validation, recipe)


def _encoded(job: Job, task: Task, part: str, limit: int | None) -> list[Encoded]:
    """Prompts and answers of one part of a task, in the order of the file."""
    examples = task.examples(part)[:limit]
    try:
        return [
            job.collator.encode(prompt(task.instruction(example, part), example), answer(example.target))
            for example in examples
        ]
    except GliderError as error:
        raise GliderError(f"task {task.name!r}, {part}: {error}") from None
