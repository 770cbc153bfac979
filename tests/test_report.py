"""Tables and files of an evaluation."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from glider_dist.errors import GliderError
from glider_dist.evaluation.report import (
    QueryResult,
    RouterResult,
    mean_score,
    summary_table,
    task_table,
    write_reports,
)


def _query(task: str, number: int, split: str, score: float, **changes: object) -> QueryResult:
    own_first = True if split == "held_in" else None
    query = QueryResult(task, f"{task}-{number}", split, score, "yes", "yes", own_first, None)
    return dataclasses.replace(query, **changes)  # type: ignore[arg-type]


def _result(router: str, sentiment: list[float], number: list[float], french: list[float]) -> RouterResult:
    tasks = (
        ("sentiment", "held_in", sentiment),
        ("number", "held_in", number),
        ("french", "held_out", french),
    )
    queries = [
        _query(task, index, split, score) for task, split, scores in tasks for index, score in enumerate(scores)
    ]
    return RouterResult(router, tuple(queries), seconds=16.0, made_with={"ranks": 2, "batch_size": 16})


PHATGOOSE = _result("phatgoose", [1.0, 0.0, 0.0, 0.0], [0.0, 1.0], [0.0, 0.0])
GLIDER = _result("glider", [1.0, 1.0, 1.0, 0.0], [1.0, 1.0], [1.0, 0.0])


def _without(result: RouterResult, **changes: object) -> RouterResult:
    queries = tuple(dataclasses.replace(query, **changes) for query in result.queries)  # type: ignore[arg-type]
    return dataclasses.replace(result, queries=queries)


def _row(table: str, name: str) -> list[str]:
    return next(line for line in table.splitlines() if line.startswith(name)).split()


def test_the_summary_has_a_row_per_router_in_the_given_order() -> None:
    table = summary_table([PHATGOOSE, GLIDER], samples=100, seed=0)
    lines = table.splitlines()
    assert lines[0].split("  ")[0] == "router"
    assert [line.split()[0] for line in lines[2:4]] == ["phatgoose", "glider"]
    assert len({len(line) for line in lines[:4]}) == 1


def test_the_summary_averages_over_tasks_and_divides_time_by_queries() -> None:
    row = _row(summary_table([GLIDER], samples=100, seed=0), "glider")
    assert row[1] == "0.875"
    assert row[2].startswith("[")
    assert row[4] == "0.500"
    assert row[-2:] == ["1.000", "2.000"]


def test_what_is_tracked_is_the_score_of_the_table_whatever_the_numbers_of_queries() -> None:
    assert mean_score(PHATGOOSE, "held_in") == pytest.approx((0.25 + 0.5) / 2)
    assert f"{mean_score(PHATGOOSE, 'held_in'):.3f}" in summary_table([PHATGOOSE], samples=10, seed=0)
    assert mean_score(RouterResult("base", (), 1.0, {}), "held_out") is None


def test_own_expert_first_is_a_share_of_held_in_queries() -> None:
    queries = list(GLIDER.queries)
    queries[0] = dataclasses.replace(queries[0], own_first=False)
    table = summary_table([dataclasses.replace(GLIDER, queries=tuple(queries))], samples=10, seed=0)
    assert _row(table, "glider")[-2] == "0.833"


def test_a_router_without_global_scores_has_a_dash_and_needs_no_explanation_of_it() -> None:
    table = summary_table([_without(PHATGOOSE, own_first=None)], samples=10, seed=0)
    assert _row(table, "phatgoose")[-2] == "-"
    assert "Own expert first:" not in table
    assert "Own expert first:" in summary_table([GLIDER], samples=10, seed=0)


def test_without_held_out_tasks_their_columns_are_dashes(tmp_path: Path) -> None:
    held_in = tuple(query for query in GLIDER.queries if query.split == "held_in")
    results = [dataclasses.replace(result, queries=held_in) for result in (PHATGOOSE, GLIDER)]
    table = summary_table(results, samples=10, seed=0)
    assert _row(table, "glider")[4] == "-"
    assert "held-out -" in table
    assert "0 held-out tasks (0 queries)" in table
    write_reports(tmp_path, results, {}, samples=10)
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert written["routers"]["glider"]["held_out"] == {"mean": None, "low": None, "high": None}


def test_a_router_that_answered_nothing_is_a_row_of_dashes() -> None:
    row = _row(summary_table([RouterResult("base", (), 1.0, {"ranks": 1})], samples=10, seed=0), "base")
    assert row == ["base", "-", "-", "-", "-"]


def test_glider_is_compared_with_phatgoose_when_both_ran() -> None:
    table = summary_table([PHATGOOSE, GLIDER], samples=200, seed=0)
    line = next(line for line in table.splitlines() if line.startswith("glider - phatgoose"))
    assert "held-in +0.500 [" in line
    assert "held-out +0.500 [" in line
    assert "glider - phatgoose" not in summary_table([GLIDER], samples=10, seed=0)


def test_the_comparison_pairs_queries_by_id_and_not_by_position() -> None:
    shuffled = dataclasses.replace(GLIDER, queries=GLIDER.queries[::-1])
    in_order = summary_table([GLIDER, PHATGOOSE], samples=100, seed=0)
    assert summary_table([shuffled, PHATGOOSE], samples=100, seed=0) == in_order


def test_a_comparison_over_different_queries_is_refused() -> None:
    fewer = dataclasses.replace(GLIDER, queries=GLIDER.queries[1:])
    with pytest.raises(GliderError, match="different queries"):
        summary_table([fewer, PHATGOOSE], samples=10, seed=0)


def test_choice_columns_appear_only_with_choice_scores_and_average_tasks_that_have_them() -> None:
    assert "by choice" not in summary_table([GLIDER], samples=10, seed=0)
    queries = tuple(
        dataclasses.replace(query, choice_score=float(query.id == "sentiment-0"))
        if query.task == "sentiment"
        else query
        for query in GLIDER.queries
    )
    with_choices = dataclasses.replace(GLIDER, queries=queries)
    table = summary_table([with_choices], samples=10, seed=0)
    assert "held-in by choice" in table.splitlines()[0]
    assert _row(table, "glider")[-2:] == ["0.250", "-"]


def test_the_text_below_the_table_says_what_was_measured() -> None:
    oracle = dataclasses.replace(GLIDER, router="oracle")
    table = summary_table([GLIDER, oracle], samples=123, seed=0)
    assert "2 held-in tasks (6 queries) and 1 held-out tasks (2 queries)" in table
    assert "on 2 ranks" in table
    assert "123 samples" in table
    assert "not a method" in table
    assert "oracle" not in summary_table([GLIDER], samples=10, seed=0)


def test_results_without_a_router_or_with_one_twice_are_refused() -> None:
    with pytest.raises(GliderError, match="no results"):
        summary_table([], samples=10, seed=0)
    with pytest.raises(GliderError, match="twice"):
        task_table([GLIDER, GLIDER])


def test_the_task_table_has_tasks_as_rows_and_routers_as_columns() -> None:
    lines = task_table([PHATGOOSE, GLIDER]).splitlines()
    assert lines[0].split() == ["task", "split", "queries", "phatgoose", "glider"]
    assert [line.split() for line in lines[2:]] == [
        ["number", "held-in", "2", "0.500", "1.000"],
        ["sentiment", "held-in", "4", "0.250", "0.750"],
        ["french", "held-out", "2", "0.000", "0.500"],
    ]


def test_a_task_that_a_router_did_not_answer_is_a_dash() -> None:
    fewer = dataclasses.replace(PHATGOOSE, router="base", queries=PHATGOOSE.queries[:4])
    assert _row(task_table([GLIDER, fewer]), "french")[-1] == "-"


def test_results_json_holds_what_the_tables_show_and_the_extra_keys(tmp_path: Path) -> None:
    extra = {"config": {"seed": 3}, "routing": {"layer": [1, 2]}}
    write_reports(tmp_path / "new", [PHATGOOSE, GLIDER], extra, samples=50, seed=3)
    written = json.loads((tmp_path / "new" / "results.json").read_text(), parse_constant=pytest.fail)
    assert {key: written[key] for key in extra} == extra
    assert written["bootstrap"] == {"samples": 50, "seed": 3, "level": 0.95}
    glider = written["routers"]["glider"]
    assert glider["held_in"]["mean"] == 0.875
    assert glider["held_in"]["low"] <= 0.875 <= glider["held_in"]["high"]
    assert glider["own_expert_first"] == 1.0
    assert glider["seconds"] == 16.0
    assert glider["tasks"]["french"] == {"split": "held_out", "queries": 2, "score": 0.5, "by_choice": None}
    assert written["glider_minus_phatgoose"]["held_out"]["mean"] == 0.5


def test_an_extra_key_that_would_hide_results_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(GliderError, match="'routers'"):
        write_reports(tmp_path, [GLIDER], {"routers": {}}, samples=10)
    assert list(tmp_path.iterdir()) == []


def test_queries_csv_returns_every_answer_as_it_was(tmp_path: Path) -> None:
    nasty = 'a, "b"\nc; é 漢'
    results = [_without(PHATGOOSE, prediction=nasty, own_first=None), _without(GLIDER, choice_score=1.0)]
    write_reports(tmp_path, results, {}, samples=10)
    with open(tmp_path / "queries.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 16
    assert rows[0]["router"] == "phatgoose"
    assert rows[0]["prediction"] == nasty
    assert (rows[0]["own_first"], rows[0]["choice_score"]) == ("", "")
    assert (rows[8]["own_first"], rows[8]["choice_score"]) == ("True", "1.0")
    assert [float(row["score"]) for row in rows[8:]] == [query.score for query in GLIDER.queries]


def test_half_a_surrogate_pair_in_an_answer_does_not_cost_the_results(tmp_path: Path) -> None:
    write_reports(tmp_path, [_without(GLIDER, target="\ud83d")], {}, samples=10)
    assert "\\ud83d" in (tmp_path / "queries.csv").read_text(encoding="utf-8")


def test_tasks_csv_has_the_task_table(tmp_path: Path) -> None:
    write_reports(tmp_path, [PHATGOOSE, GLIDER], {}, samples=10)
    with open(tmp_path / "tasks.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert rows[2] == {
        "task": "french",
        "split": "held-out",
        "queries": "2",
        "phatgoose": "0.0",
        "glider": "0.5",
    }


def test_files_are_replaced_and_no_temporary_file_stays(tmp_path: Path) -> None:
    write_reports(tmp_path, [GLIDER], {}, samples=10)
    write_reports(tmp_path, [PHATGOOSE], {}, samples=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["queries.csv", "results.json", "tasks.csv"]
    assert list(json.loads((tmp_path / "results.json").read_text())["routers"]) == ["phatgoose"]


def test_rows_that_were_made_with_other_settings_are_told_apart() -> None:
    other = dataclasses.replace(GLIDER, made_with={"ranks": 2, "batch_size": 8})
    assert "Rows differ" not in summary_table([PHATGOOSE, GLIDER], samples=10, seed=0)
    table = summary_table([PHATGOOSE, other], samples=10, seed=0)
    assert "Rows differ in batch_size: 16 (phatgoose), 8 (glider)." in table.splitlines()
