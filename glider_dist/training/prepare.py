"""From tasks to this rank's trainees: examples encoded, recipes checked, work shared out by measured tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from glider_dist.config import Config
from glider_dist.errors import GliderError, first_line
from glider_dist.job import Job
from glider_dist.model.batch import Encoded
from glider_dist.model.example import encode_example
from glider_dist.parallel.replicas import Replicas, check_replica_count, divide
from glider_dist.pool.files import read_json, write_json
from glider_dist.tasks.task import Task
from glider_dist.training.order import replicas_for, share_out
from glider_dist.training.trainee import Recipe, Trainee
from glider_dist.training.unfinished import Facts, digest

SHARES = "shares.json"
_OF_THE_JOB = {
    "experts_in_flight",
    "replicas",
    "micro_batch_size",
    "micro_batch_tokens",
    "moments",
    "save_steps",
    "save_minutes",
    "keep_last",
    "gradient_checkpointing",
}
"""Settings of ``train`` that no single task can have."""


def prepare(job: Job, tasks: Sequence[Task], kind: str) -> tuple[list[Trainee], Replicas]:
    """This rank's share of the tasks, such that all ranks train on about the same number of tokens, and who trains
    them with it; where a job of as many ranks was broken off, as it had shared them out.

    Each rank reads and encodes a part of the tasks to learn what they cost, and then the ones that it trains.

    Args:
        kind: "expert" or "gate".

    Raises:
        GliderError: on all ranks, for the first task whose settings or examples are wrong, or if
            ``train.replicas`` does not divide the ranks.
    """
    world, asked = job.ranks.world, job.cfg.train.replicas
    check_replica_count(asked or 1, world)
    recipes = {task.name: _recipe(job, task, kind == "gate") for task in tasks}
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
    before = _shares_before(job, kind, set(recipes))
    if before is None:
        names = list(recipes)
        sizes = [costs[name] for name in names]
        count = asked or replicas_for(sizes, world, min(recipe.batch_size for recipe in recipes.values()))
        before = count, [[names[i] for i in part] for part in share_out(sizes, world // count)]
    count, shares = before
    replicas = divide(job.ranks, count)
    task_of = {task.name: task for task in tasks}
    mine = shares[replicas.team]
    return [known.get(name) or _trainee(job, task_of[name], recipes[name]) for name in mine], replicas


def _shares_before(job: Job, kind: str, names: set[str]) -> tuple[int, list[list[str]]] | None:
    """Replicas and shares of an earlier start that fit this one, or None."""
    path = job.checkpoints(kind).folder / SHARES

    def read() -> dict[str, Any]:
        # Rank 0 alone, since it may write the file before a slower rank has looked for it.
        return read_json(path, "delete it") if job.ranks.is_main and path.exists() else {}

    found = job.ranks.gather(job.ranks.together(read))[0]
    shares, count = found.get("shares", []), found.get("replicas", 1)
    if len(shares) * count != job.ranks.world or job.cfg.train.replicas not in (None, count):
        return None
    if not names <= {name for share in shares for name in share}:
        return None
    return count, [[name for name in share if name in names] for share in shares]


def note_shares(job: Job, kind: str, mine: Sequence[Trainee], replicas: Replicas) -> None:
    """Write down who trains what, for a start after this one."""
    shares = job.ranks.gather([trainee.name for trainee in mine])[:: replicas.count]
    path = job.checkpoints(kind).folder / SHARES
    before = _shares_before(job, kind, {name for share in shares for name in share})
    if before is None:
        job.ranks.on_main(lambda: write_json(path, {"replicas": replicas.count, "shares": shares}))


def forget_done(job: Job, kind: str, done: Iterable[str]) -> None:
    """Delete checkpoints of what is in the pool: their job was killed before it could."""
    files = job.checkpoints(kind)
    files.clear_up()
    for name in set(files.names()) & set(done):
        files.remove(name)


def task_facts(task: Task) -> Facts:
    """What of a task's own files its training depends on."""
    facts = {}
    for part in ("train", "validation"):
        where = f"{task.origin[part]} in tasks.path" if part in task.origin else f"the {part} examples of its task"
        facts[where] = digest([(one.id, one.input, one.target) for one in task.examples(part)])
    return {**facts, "the definition or the wordings of its task": digest((task.definition, task.instructions))}


def _recipe(job: Job, task: Task, gate: bool) -> Recipe:
    """The configured recipe with the task's own settings in place of the job's."""
    if of_the_job := sorted(set(task.settings) & _OF_THE_JOB):
        raise GliderError(
            f"the settings of task {task.name!r} under 'train': {of_the_job[0]} is the whole job's; set "
            f"train.{of_the_job[0]} in the configuration"
        )
    try:
        train: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(job.cfg.train), task.settings))
        Config(train=train).validate()
    except (GliderError, OmegaConfBaseException) as error:
        raise GliderError(f"the settings of task {task.name!r} under 'train': {first_line(error)}") from None
    return Recipe.of(train, job.cfg.seed, gate)


def _trainee(job: Job, task: Task, recipe: Recipe) -> Trainee:
    validation = _encoded(job, task, "validation", recipe.eval_examples)
    return Trainee(task.name, _encoded(job, task, "train", None), validation, recipe)


def _encoded(job: Job, task: Task, part: str, limit: int | None) -> list[Encoded]:
    """Prompts and answers of one part of a task, in the order of the file."""
    return [encode_example(job.collator, task, part, example)[1] for example in task.examples(part)[:limit]]
