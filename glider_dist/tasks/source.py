"""The tasks that a configuration names."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from glider_dist.config import TasksConfig, shard_of
from glider_dist.errors import GliderError
from glider_dist.tasks import hub, jsonl, procedural
from glider_dist.tasks.task import Task


@dataclass(frozen=True)
class TaskSuite:
    """The tasks of a run: an expert for each of ``held_in``; ``held_out`` is evaluated only.

    ``held_in`` is empty where ``tasks.shard`` leaves nothing for this job.
    """

    held_in: tuple[Task, ...]
    held_out: tuple[Task, ...]

    @property
    def all(self) -> tuple[Task, ...]:
        return self.held_in + self.held_out


def load_tasks(cfg: TasksConfig, seed: int) -> TaskSuite:
    """Find the configured tasks. No example is read yet.

    An empty ``cfg.held_in`` or ``cfg.held_out`` takes every task with that split, less those that the other
    list names; a task that a list names moves to that split.

    Args:
        cfg: the source, its path, the names and the limit, validated.
        seed: draws the examples of the procedural source; the others do not depend on it.

    Raises:
        GliderError: if the source cannot be read, a name is unknown, unusable or used twice, a task for
            evaluation only is held in, or no task is held in.
    """
    tasks = _read(cfg, seed)
    by_name: dict[str, Task] = {}
    for task in tasks:
        # The name becomes a folder of the pool, so it must not lead out of it or hide in it.
        if not task.name or task.name.startswith(".") or re.search(r"[/\\\0]", task.name):
            raise GliderError(
                f"the task name {task.name!r} cannot name a folder; use one without /, \\ or a leading dot"
            )
        if task.name in by_name:
            raise GliderError(f"two tasks are called {task.name!r}; rename one")
        by_name[task.name] = task
    held_in = _named(cfg.held_in, by_name, "held_in") or [
        task for task in tasks if task.split == "held_in" and task.name not in cfg.held_out
    ]
    held_out = _named(cfg.held_out, by_name, "held_out") or [
        task for task in tasks if task.split == "held_out" and task.name not in cfg.held_in
    ]
    if not held_in:
        raise GliderError("no task is held in, so there is no expert to train; name some in tasks.held_in")
    for task in held_in:
        if task.evaluation_only:
            raise GliderError(
                f"task {task.name!r} is for evaluation only (BIG-bench data must not be trained on); "
                "take it out of the held-in tasks"
            )
    part, parts = shard_of(cfg.shard) if cfg.shard is not None else (0, 1)
    return TaskSuite(tuple(held_in[part::parts]), tuple(held_out))


def _read(cfg: TasksConfig, seed: int) -> list[Task]:
    if cfg.source == "procedural":
        return procedural.make_tasks(seed, cfg.limit)
    if cfg.source not in ("jsonl", "datasets"):
        raise GliderError(f"tasks.source is {cfg.source!r}, but must be procedural, jsonl or datasets")
    if cfg.path is None:
        wanted = "the folder with tasks.json" if cfg.source == "jsonl" else "a JSON file that maps data sets"
        raise GliderError(f"tasks.source={cfg.source} needs tasks.path, {wanted}")
    path = Path(cfg.path).expanduser()
    return jsonl.read_tasks(path, cfg.limit) if cfg.source == "jsonl" else hub.read_tasks(path, cfg.limit)


def _named(names: list[str], by_name: dict[str, Task], split: str) -> list[Task]:
    chosen = []
    for position, name in enumerate(names):
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.0)[0]
            raise GliderError(
                f"tasks.{split} names {name!r}, but there is no such task; the nearest name is {near!r}"
            )
        if name in names[:position]:
            raise GliderError(f"tasks.{split} names {name!r} twice; name it once")
        chosen.append(dataclasses.replace(by_name[name], split=split))
    return chosen
