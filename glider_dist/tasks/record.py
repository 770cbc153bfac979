"""Checks that tasks and examples from outside have to pass, whatever file they come from."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from glider_dist.errors import GliderError
from glider_dist.pool.files import read_json
from glider_dist.tasks.task import Example, Task, stable_hash

METRICS = ("exact_match", "rouge_l")
SPLITS = ("held_in", "held_out")


def task_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file ``{"tasks": [{"name": ...}, ...]}``. ``source`` judges the names.

    Raises:
        GliderError: if the file is not of that shape.
    """
    records = read_json(path).get("tasks")
    if not isinstance(records, list) or not records:
        raise GliderError(f'{path} must be an object with a list of tasks, {{"tasks": [{{"name": ...}}]}}')
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not isinstance(record.get("name"), str):
            raise GliderError(f"{path}: task number {number} must be an object with a name")
    return records


def make_task(
    record: dict[str, Any],
    where: str,
    load: Callable[[str], list[Example]],
    *,
    descriptions: tuple[str, ...] = (),
    instructions: tuple[str, ...] = (),
    evaluation_only: bool = False,
) -> Task:
    """A task from a record with ``name``, ``definition``, ``split``, ``metric`` and ``category``, and the
    task's own training settings under ``train``.

    Raises:
        GliderError: for a missing definition, or a split or metric that does not exist.
    """
    name = record["name"]
    definition = record.get("definition")
    if not isinstance(definition, str) or not definition.strip():
        raise GliderError(f"{where}: task {name!r} has no definition; say in a sentence what to do")
    split = record.get("split")
    if split not in SPLITS:
        raise GliderError(f"{where}: the split of task {name!r} is {split!r}, but must be held_in or held_out")
    metric = record.get("metric", "exact_match")
    if metric not in METRICS:
        raise GliderError(
            f"{where}: the metric of task {name!r} is {metric!r}, but must be exact_match or rouge_l"
        )
    settings = record.get("train") or {}
    if not isinstance(settings, dict):
        raise GliderError(f"{where}: train of task {name!r} must be an object of settings, not {settings!r:.40}")
    return Task(
        name=name,
        definition=definition,
        split=split,
        metric=metric,
        category=str(record.get("category") or ""),
        descriptions=descriptions,
        instructions=instructions,
        evaluation_only=evaluation_only,
        load=load,
        settings=settings,
    )


def texts(value: Any, what: str, where: str) -> tuple[str, ...]:
    """A list of non-empty strings as a tuple; ``None`` is ``()``.

    Raises:
        GliderError: if it is anything else.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise GliderError(f"{where}: {what} must be a list of non-empty strings")
    for text in value:
        check_text(text, f"{where}: {what}")
    return tuple(value)


def check_text(text: str, what: str) -> None:
    """Raises GliderError if the text holds half of a surrogate pair, which JSON and a shell let through."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise GliderError(f"{what} holds a character that is no Unicode (half a surrogate pair); write it anew")


def make_example(row: dict[str, Any], choices: tuple[str, ...] | None, where: str) -> Example:
    """An example from ``{id, input, target, choices?, targets?}``. ``choices`` serves a row without its own.

    Raises:
        GliderError: for a missing or empty field, or a target that is not text or not among the choices.
    """
    for key in ("id", "input", "target"):
        value = row.get(key)
        if value is None:
            raise GliderError(f"{where}: the example has no {key}")
        if not isinstance(value, str):
            raise GliderError(f"{where}: {key} is {value!r}, but must be text in quotation marks")
        if not value.strip():
            raise GliderError(f"{where}: {key} is empty")
        check_text(value, f"{where}: {key}")
    choices = texts(row.get("choices"), "choices", where) or choices
    if choices and row["target"] not in choices:
        raise GliderError(f"{where}: the target {row['target']!r} is not among the choices {list(choices)}")
    targets = tuple(dict.fromkeys((row["target"], *texts(row.get("targets"), "targets", where))))
    return Example(row["id"], row["input"], row["target"], targets, choices)


def sample(ids: list[str], limit: int | None) -> list[int]:
    """At most ``limit`` positions, in their order in ``ids``, chosen by a hash of the id.

    Taking the first ones instead would leave one label of a file that is sorted by label. The choice needs no
    seed, so every run is scored on the same examples, and a larger limit only adds to a smaller one.
    """
    if limit is None or limit >= len(ids):
        return list(range(len(ids)))
    return sorted(sorted(range(len(ids)), key=lambda position: stable_hash(ids[position]))[:limit])


def mixed(examples: list[Example]) -> list[Example]:
    """The examples in their order, or by a hash of their ids if they are sorted by target.

    Evaluation, calibration and validation read the first so many: of a sorted file they would see one label.
    """
    targets = [example.target for example in examples]
    runs = sum(1 for _ in groupby(targets))
    if 1 < len(set(targets)) == runs < len(targets):
        return sorted(examples, key=lambda example: stable_hash(example.id))
    return examples
