"""Tasks from a folder.

    tasks.json                    {"tasks": [{name, definition, split, metric?, category?, choices?}]}
    tasks/<name>/<part>.jsonl     a line: {id, input, target, choices?, targets?}; train, validation and test
    instructions.json             optional: {name: {expert_descriptions: [...], query_instructions: [...]}}

``tasks.json`` and ``instructions.json`` are read at once; a split is read and checked when it is asked for.
BIG-bench data asks never to be trained on (it carries a canary): tasks with the ``provenance`` bigbench, or
whose name starts with ``bigbench_`` or ``bbh_``, are for evaluation only.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from glider_dist.errors import GliderError
from glider_dist.pool.files import read_json, read_text
from glider_dist.tasks.record import (
    make_example,
    make_task,
    mixed,
    sample,
    task_records,
    texts,
)
from glider_dist.tasks.task import PARTS, Example, Task

BIG_BENCH_PREFIXES = ("bigbench_", "bbh_")


def read_tasks(folder: Path, limit: int | None) -> list[Task]:
    """Every task of the folder, in the order of ``tasks.json``, without its examples.

    Args:
        folder: holds ``tasks.json``.
        limit: examples per task and split at most; a sample that depends on the examples' ids alone.

    Raises:
        GliderError: if the folder, ``tasks.json`` or a field of it is missing or malformed.
    """
    if not folder.is_dir():
        raise GliderError(f"tasks.path is {folder}, but there is no such folder")
    index = folder / "tasks.json"
    if not index.is_file():
        raise GliderError(f"{folder} has no tasks.json; tasks.path must name the folder that holds it")
    wordings = _wordings(folder / "instructions.json")
    tasks = []
    for record in task_records(index):
        name = record["name"]
        # "per instance" and null both mean that the lines bring their own choices, if any.
        choices = record.get("choices") if isinstance(record.get("choices"), list) else None
        descriptions, instructions = wordings.get(name, ((), ()))
        for_all = texts(choices, f"choices of {name!r}", str(index)) or None
        read = partial(_read_split, folder, name, for_all, limit)
        made = make_task(
            record,
            str(index),
            read,
            descriptions=descriptions,
            instructions=instructions,
            evaluation_only=record.get("provenance") == "bigbench" or name.startswith(BIG_BENCH_PREFIXES),
        )
        tasks.append(replace(made, origin={part: f"tasks/{name}/{part}.jsonl" for part in PARTS}))
    return tasks


def _wordings(path: Path) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    if not path.exists():
        return {}
    entries = read_json(path)
    if not all(isinstance(entry, dict) for entry in entries.values()):
        raise GliderError(f"{path} must be an object of objects, one per task")
    return {
        name: (
            texts(entry.get("expert_descriptions"), f"expert_descriptions of {name!r}", str(path)),
            texts(entry.get("query_instructions"), f"query_instructions of {name!r}", str(path)),
        )
        for name, entry in entries.items()
    }


def _read_split(
    folder: Path, name: str, choices: tuple[str, ...] | None, limit: int | None, part: str
) -> list[Example]:
    path = folder / "tasks" / name / f"{part}.jsonl"
    if not path.is_file():
        raise GliderError(f"task {name!r} has no {part} split: {path} does not exist")
    examples: list[Example] = []
    line_of: dict[str, int] = {}
    # Not splitlines(): JSON allows the separators U+2028 and U+0085 unescaped inside a string.
    for number, line in enumerate(read_text(path, "convert it").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        example = make_example(_json_object(line, where), choices, where)
        if example.id in line_of:
            raise GliderError(f"{where}: the id {example.id!r} is already used in line {line_of[example.id]}")
        line_of[example.id] = number
        examples.append(example)
    if not examples:
        raise GliderError(f"{path} is empty; task {name!r} needs at least one line there")
    return mixed([examples[position] for position in sample([example.id for example in examples], limit)])


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise GliderError(f"{where}: this is not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(row, dict):
        raise GliderError(f"{where}: a line must be an object {{id, input, target}}, not {row!r:.40}")
    return row
