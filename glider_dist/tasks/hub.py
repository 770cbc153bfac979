"""Tasks from data sets of the Hugging Face hub, or from local files that ``datasets`` can read.

``tasks.path`` names a JSON file:

    {"tasks": [{
        "name": "sst2", "definition": "...", "split": "held_in", "metric": "exact_match", "category": "...",
        "dataset": "nyu-mll/glue", "config": "sst2",
        "data_files": {...},                     optional, passed to datasets.load_dataset as it is
        "split_names": {"test": "validation"},   optional: which split of the data set serves as which of ours
        "input": "Sentence: {sentence}",         a template over the data set's columns
        "target": "label",                       a column, or a template
        "choices": ["negative", "positive"],     optional; the target column may count into it from 0
        "descriptions": [...], "instructions": [...]
    }]}

Where no split is left for validation, a tenth of train is set apart for it by a hash of the row number. Rows
without a target (no value, no text, or the label -1 that stands for none) or without an input are left out.
"""

from __future__ import annotations

import json
import logging
import re
from functools import cache, partial
from pathlib import Path
from string import Formatter
from typing import Any

from glider_dist.errors import GliderError
from glider_dist.tasks.jsonl import BIG_BENCH_PREFIXES
from glider_dist.tasks.record import make_example, make_task, mixed, sample, task_records, texts
from glider_dist.tasks.task import PARTS, Example, Task

log = logging.getLogger(__name__)
_VALIDATION_SHARE = 10
_BIG_BENCH = re.compile(r"big[-_]?bench|\bbbh", re.IGNORECASE)


def read_tasks(mapping: Path, limit: int | None) -> list[Task]:
    """Every task of the mapping file, without its data, which is fetched when the first split is asked for.

    Args:
        mapping: the JSON file described above.
        limit: examples per task and split at most; a sample that depends on the row numbers alone.

    Raises:
        GliderError: if the file or a field of it is missing or malformed.
    """
    tasks = []
    for record in task_records(mapping):
        name, where = record["name"], f"{mapping}, task {record['name']!r}"
        for key in ("dataset", "input", "target"):
            if not isinstance(record.get(key), str) or not record[key]:
                raise GliderError(f"{where}: {key} is missing or not text")
        split_names = record.get("split_names", {})
        if not isinstance(split_names, dict) or not set(split_names) <= set(PARTS):
            raise GliderError(f"{where}: split_names must be an object with the keys train, validation and test")
        if not all(isinstance(split, str) for split in split_names.values()):
            raise GliderError(f"{where}: split_names must name splits of the data set, as text")
        tasks.append(
            make_task(
                record,
                str(mapping),
                partial(_read_split, record, texts(record.get("choices"), "choices", where), limit, where),
                descriptions=texts(record.get("descriptions"), "descriptions", where),
                instructions=texts(record.get("instructions"), "instructions", where),
                evaluation_only=name.startswith(BIG_BENCH_PREFIXES) or bool(_BIG_BENCH.search(record["dataset"])),
            )
        )
    return tasks


def _read_split(
    record: dict[str, Any], choices: tuple[str, ...], limit: int | None, where: str, part: str
) -> list[Example]:
    splits = _load(record["dataset"], record.get("config"), json.dumps(record.get("data_files")))
    given = record.get("split_names", {})
    names = {ours: given.get(ours, ours) for ours in PARTS}
    carved = names["validation"] in (names["train"], names["test"])
    carved = carved or ("validation" not in given and "validation" not in splits)
    source = names["train"] if carved and part == "validation" else names[part]
    if source not in splits:
        raise GliderError(
            f"{where}: the data set has no split {source!r} to serve as {part}; it has {sorted(splits)}, "
            "so say in split_names which one to use"
        )
    if part != "test" and source == names["test"]:
        raise GliderError(
            f"{where}: the split {source!r} serves as test, so it cannot serve as {part}; change split_names"
        )
    rows = splits[source]
    ids = [f"{record['name']}-{source}-{row}" for row in range(len(rows))]
    kept = list(range(len(rows)))
    if carved and part != "test":
        apart = set(sample(ids, len(rows) // _VALIDATION_SHARE))
        kept = [row for row in kept if (row in apart) == (part == "validation")]
    label = rows.features.get(record["target"])
    choices = choices or tuple(getattr(label, "names", None) or ())
    lacking = _incomplete(rows, record, choices)
    kept = [row for row in kept if row not in lacking]
    if lacking and not kept:
        raise GliderError(
            f"{where}: no row of the split {source!r} has both an input and a target (or its labels are all -1, "
            f"as in an unlabelled test set); say in split_names which split serves as {part}"
        )
    if lacking:
        log.warning("%s: %d of %d rows of %s lack an input or a target", where, len(lacking), len(rows), source)
    chosen = [kept[position] for position in sample([ids[row] for row in kept], limit)]
    return mixed(
        [_example(rows[row], record, ids[row], choices, f"{where}, {source} row {row}") for row in chosen]
    )


def _incomplete(rows: Any, record: dict[str, Any], choices: tuple[str, ...]) -> set[int]:
    target = record["target"]
    columns = {target} if target in rows.features else _columns(target)
    columns = (columns | _columns(record["input"])) & set(rows.features)
    values = rows.select_columns(sorted(columns))[:] if columns else {}
    lacking = {row for column in values.values() for row, value in enumerate(column) if value is None}
    for row, value in enumerate(values.get(target, ())):
        if (isinstance(value, str) and not value.strip()) or (choices and value == -1):
            lacking.add(row)
    templates = {record["input"], *({target} - set(rows.features))}
    for row in set(range(len(rows))) - lacking:
        given = {name: column[row] for name, column in values.items()}
        if any(_is_blank(template, given) for template in templates):
            lacking.add(row)
    return lacking


def _is_blank(template: str, row: dict[str, Any]) -> bool:
    """Whether a template gives no text for a row, or names an entry of a list that is shorter (no answer, say)."""
    try:
        return not template.format_map(row).strip()
    except IndexError:
        return True
    except (KeyError, ValueError, AttributeError):
        return False  # told when it is filled


def _columns(template: str) -> set[str]:
    """The columns that a template names; what it cannot mean is told when it is filled."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name]
    except ValueError:
        return set()
    return {re.split(r"[.\[]", name)[0] for name in names}


@cache
def _load(dataset: str, config: str | None, data_files: str) -> Any:
    """All splits, as ``datasets.DatasetDict``. ``data_files`` is JSON text so that the call can be cached."""
    import datasets

    try:
        return datasets.load_dataset(dataset, config, data_files=json.loads(data_files))
    except Exception as error:  # its errors have no common base: network, missing names, malformed files
        # Whole, since the names of the configurations there are come last.
        reason = " ".join((str(error) or type(error).__name__).split())
        raise GliderError(
            f"the data set {dataset!r} is neither cached nor within reach ({reason[:500]}); "
            "check its name, its config and the network"
        ) from error


def _example(
    row: dict[str, Any], record: dict[str, Any], id: str, choices: tuple[str, ...], where: str
) -> Example:
    if record["target"] in row:
        target = _label(row[record["target"]], choices, where)
    else:
        target = _fill(record["target"], row, where)
    filled = {"id": id, "input": _fill(record["input"], row, where), "target": target}
    return make_example(filled, choices or None, where)


def _label(value: Any, choices: tuple[str, ...], where: str) -> str:
    if isinstance(value, str):
        return value.strip()
    if not isinstance(value, int | float):
        raise GliderError(
            f"{where}: the target is {value!r:.40}; use a column with text or numbers, or a template"
        )
    if not choices or not isinstance(value, int):
        return str(value)
    if not 0 <= value < len(choices):
        raise GliderError(
            f"{where}: the label {value} is not one of the {len(choices)} choices, which count from 0"
        )
    return choices[value]


def _fill(template: str, row: dict[str, Any], where: str) -> str:
    try:
        return template.format_map(row).strip()
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise GliderError(
            f"{where}: the template {template!r} does not fit the columns {sorted(row)} ({error!r})"
        ) from None
