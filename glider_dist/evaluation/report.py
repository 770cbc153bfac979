"""Results of an evaluation as text tables and as files. Nothing here computes a score or needs a model."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glider_dist.errors import GliderError
from glider_dist.evaluation.intervals import Interval, mean_interval, paired_difference
from glider_dist.pool.files import replacing, write_json
from glider_dist.text_table import table

SPLITS = ("held_in", "held_out")


@dataclass(frozen=True)
class QueryResult:
    """One query answered under one router.

    Attributes:
        split: "held_in" or "held_out".
        score: the task's metric on the generated answer, 0 to 1.
        own_first: whether the expert with the largest global score is the task's own; None for held-out
            tasks and for routers without global scores.
        choice_score: 1.0 if the right choice is the likeliest, else 0.0; None for tasks without choices.
    """

    task: str
    id: str
    split: str
    score: float
    prediction: str
    target: str
    own_first: bool | None
    choice_score: float | None


@dataclass(frozen=True)
class RouterResult:
    """All queries under one router.

    Attributes:
        seconds: elapsed wall time for all of them on all ranks.
        made_with: ``ranks`` and other settings that decide what shares a batch and how long it takes.
    """

    router: str
    queries: tuple[QueryResult, ...]
    seconds: float
    made_with: dict[str, Any]


@dataclass(frozen=True)
class _Summary:
    held_in: Interval
    held_out: Interval
    held_in_by_choice: Interval
    held_out_by_choice: Interval
    own_expert_first: float | None
    seconds: float
    seconds_per_query: float
    made_with: dict[str, Any]


def summary_table(results: Sequence[RouterResult], samples: int, seed: int) -> str:
    """One row per router, glider against phatgoose where both are there, and what the numbers mean.

    Args:
        samples, seed: of the bootstrap behind the intervals.

    Raises:
        GliderError: if there is no result, a router occurs twice, or glider and phatgoose answered different
            queries.
    """
    summaries = _summaries(results, samples, seed)
    queries = results[0].queries
    by_choice = any(query.choice_score is not None for result in results for query in result.queries)
    own_first = any(summary.own_expert_first is not None for summary in summaries.values())
    rows = [["router", "held-in", "held-out", "own expert first", "s/query"]]
    if by_choice:
        rows[0] += ["held-in by choice", "held-out by choice"]
    for router, row in summaries.items():
        cells = [router, _interval(row.held_in), _interval(row.held_out)]
        cells += [_number(row.own_expert_first), _number(row.seconds_per_query)]
        if by_choice:
            cells += [_number(row.held_in_by_choice.mean), _number(row.held_out_by_choice.mean)]
        rows.append(cells)
    lines = [_fixed_width(rows), ""]
    difference = _glider_minus_phatgoose(results, samples, seed)
    if difference:
        cells = [f"{_title(split)} {_interval(value, '+.3f')}" for split, value in difference.items()]
        lines += ["glider - phatgoose on the same queries: " + ", ".join(cells), ""]
    lines += _differing(results)
    lines += [
        f"{_count(queries, 'held_in')} and {_count(queries, 'held_out')}; {_ranks(results)}.",
        "Score: the task's metric (exact match or ROUGE-L F1) on the greedy answer, 0 to 1;",
        "  averaged over a task's queries, then over tasks.",
        f"[low, high]: 95 % bootstrap interval, {samples} samples of tasks, then of queries within each.",
    ]
    if own_first:
        lines.append("Own expert first: share of held-in queries whose largest global score is their own task's.")
    if by_choice:
        lines.append("By choice: how often the right choice is the likeliest, over tasks that list choices.")
    if "oracle" in summaries:
        lines.append("oracle, held-out: the best expert in hindsight, chosen by its loss on the scored queries;")
        lines.append("  an upper reference, not a method.")
    return "\n".join(lines) + "\n"


def task_table(results: Sequence[RouterResult]) -> str:
    """Mean score per task (rows, held-in first) and router (columns).

    Raises:
        GliderError: if there is no result or a router occurs twice.
    """
    return _fixed_width([[_number(cell) for cell in row] for row in _task_rows(results)]) + "\n"


def mean_score(result: RouterResult, split: str) -> float | None:
    """The score that the table shows: over a task's queries, then over tasks; None if there are none."""
    tasks = [float(scores.mean()) for scores in _by_task(result, split).values()]
    return sum(tasks) / len(tasks) if tasks else None


def write_reports(
    folder: Path, results: Sequence[RouterResult], extra: dict[str, Any], samples: int = 1000, seed: int = 0
) -> None:
    """Write results.json, tasks.csv and queries.csv into ``folder``, each atomically.

    results.json holds ``routers`` (name -> means, intervals, seconds and ``tasks``, the score of each),
    ``glider_minus_phatgoose`` where both ran, ``bootstrap``, and the keys of ``extra`` as they are. A number
    that does not exist, such as a mean over no tasks, is null there, empty in the CSV files.

    Args:
        extra: JSON values by key, such as configuration, versions and routing statistics.
        samples, seed: of the bootstrap behind the intervals.

    Raises:
        GliderError: as for :func:`summary_table`, or if ``extra`` has a key that results.json uses itself.
    """
    content: dict[str, Any] = {"bootstrap": {"samples": samples, "seed": seed, "level": 0.95}, "routers": {}}
    for result, summary in zip(results, _summaries(results, samples, seed).values(), strict=True):
        content["routers"][result.router] = {**asdict(summary), "tasks": _tasks(result)}
    difference = _glider_minus_phatgoose(results, samples, seed)
    if difference:
        content["glider_minus_phatgoose"] = {split: asdict(value) for split, value in difference.items()}
    if content.keys() & extra.keys():
        raise GliderError(f"extra key {min(content.keys() & extra.keys())!r} is taken in results.json; rename it")
    fields = ("task", "split", "id", "score", "choice_score", "own_first", "prediction", "target")
    queries: list[list[Any]] = [["router", *fields]]
    queries += [
        [result.router, *(getattr(query, name) for name in fields)]
        for result in results
        for query in result.queries
    ]
    _write_csv(folder / "queries.csv", queries)
    _write_csv(folder / "tasks.csv", _task_rows(results))
    write_json(folder / "results.json", _null_for_nan({**content, **extra}))


def _summaries(results: Sequence[RouterResult], samples: int, seed: int) -> dict[str, _Summary]:
    _check(results)
    summaries = {}
    for result in results:
        own = [query.own_first for query in result.queries if query.own_first is not None]
        scores = [_by_task(result, split) for split in SPLITS]
        choices = [_by_task(result, split, by_choice=True) for split in SPLITS]
        held_in, held_out = (mean_interval(values, samples, seed) for values in scores)
        choice_in, choice_out = (mean_interval(values, samples, seed) for values in choices)
        summaries[result.router] = _Summary(
            held_in=held_in,
            held_out=held_out,
            held_in_by_choice=choice_in,
            held_out_by_choice=choice_out,
            own_expert_first=float(np.mean(own)) if own else None,
            seconds=result.seconds,
            seconds_per_query=result.seconds / len(result.queries) if result.queries else math.nan,
            made_with=result.made_with,
        )
    return summaries


def _check(results: Sequence[RouterResult]) -> None:
    if not results:
        raise GliderError("there are no results to report; name at least one router in evaluate.routers")
    routers = [result.router for result in results]
    if len(set(routers)) < len(routers):
        raise GliderError(f"a router occurs twice in the results ({', '.join(routers)}); name each once")


def _by_task(result: RouterResult, split: str, by_choice: bool = False) -> dict[str, np.ndarray]:
    """Scores [queries] by task, in the order of the query ids: the same order for every router."""
    found: dict[str, list[float]] = {}
    for query in sorted(result.queries, key=lambda query: query.id):
        value = query.choice_score if by_choice else query.score
        if query.split == split and value is not None:
            found.setdefault(query.task, []).append(value)
    return {task: np.array(values, dtype=np.float64) for task, values in found.items()}


def _glider_minus_phatgoose(results: Sequence[RouterResult], samples: int, seed: int) -> dict[str, Interval]:
    by_router = {result.router: result for result in results}
    if not {"glider", "phatgoose"} <= by_router.keys():
        return {}
    pair = by_router["glider"], by_router["phatgoose"]
    answered = [sorted((query.task, query.id) for query in result.queries) for result in pair]
    if answered[0] != answered[1]:
        raise GliderError("glider and phatgoose answered different queries; evaluate both on the same ones")
    return {
        split: paired_difference(_by_task(pair[0], split), _by_task(pair[1], split), samples, seed)
        for split in SPLITS
    }


def _tasks(result: RouterResult) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        choices = _by_task(result, split, by_choice=True)
        for task, scores in _by_task(result, split).items():
            by_choice = float(choices[task].mean()) if task in choices else None
            score = float(scores.mean())
            found[task] = {"split": split, "queries": len(scores), "score": score, "by_choice": by_choice}
    return found


def _task_rows(results: Sequence[RouterResult]) -> list[list[Any]]:
    _check(results)
    tasks = [_tasks(result) for result in results]
    first = {task: row for scores in reversed(tasks) for task, row in scores.items()}
    order = sorted(first, key=lambda task: (SPLITS.index(first[task]["split"]), task))
    rows: list[list[Any]] = [["task", "split", "queries", *(result.router for result in results)]]
    for task in order:
        cells = [scores[task]["score"] if task in scores else None for scores in tasks]
        rows.append([task, _title(first[task]["split"]), first[task]["queries"], *cells])
    return rows


def _title(split: str) -> str:
    return split.replace("_", "-")


def _count(queries: Sequence[QueryResult], split: str) -> str:
    chosen = [query for query in queries if query.split == split]
    return f"{len({query.task for query in chosen})} {_title(split)} tasks ({len(chosen)} queries)"


def _differing(results: Sequence[RouterResult]) -> list[str]:
    """What rows were made with, where it is not the same for all: scores and times then differ by that, too."""
    lines = []
    for name in results[0].made_with:
        by_value: dict[Any, list[str]] = {}
        for result in results:
            by_value.setdefault(result.made_with.get(name), []).append(result.router)
        if len(by_value) > 1:
            cells = ", ".join(f"{value} ({', '.join(routers)})" for value, routers in by_value.items())
            lines.append(f"Rows differ in {name}: {cells}.")
    return lines


def _ranks(results: Sequence[RouterResult]) -> str:
    ranks = sorted({result.made_with["ranks"] for result in results})
    return f"s/query: elapsed seconds / queries, on {' or '.join(map(str, ranks))} rank{'s' * (ranks != [1])}"


def _number(value: Any, form: str = ".3f") -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return format(value, form) if isinstance(value, float) else str(value)


def _interval(interval: Interval, form: str = ".3f") -> str:
    if math.isnan(interval.mean):
        return "-"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _fixed_width(rows: Sequence[Sequence[str]]) -> str:
    titles, *lines = table(rows[0], rows[1:], right=rows[0][1:], cut=False).split("\n")
    return "\n".join([titles, "-" * len(titles), *lines])


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_for_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_null_for_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    with replacing(path) as temporary:
        # Half a surrogate pair, which a task file may hold, has no UTF-8 form and must not cost the results.
        temporary.write_bytes(text.getvalue().encode("utf-8", "backslashreplace"))
