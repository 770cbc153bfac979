"""Fewer queries than ranks over a sharded base: a rank without any keeps in step with the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_jobs import command, describe_and_index, launch, settings, write_tasks

from glider_dist.testing import random_pool, save_tiny_base, tiny_causal

pytestmark = pytest.mark.distributed

NAMES = ("copy", "last")
ROUTERS = "[base,phatgoose,glider,oracle]"
SMALL: dict[str, Any] = {
    "tasks__held_in": "[copy,last]",
    "evaluate__queries": 1,
    "evaluate__routers": ROUTERS,
    "evaluate__max_new_tokens": 3,
    "calibrate__queries": 1,
}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The settings of a job in the test's folder, with a pool of two experts that is ready to be used."""
    write_tasks(tmp_path / "tasks", held_in=NAMES, held_out=())
    describe_and_index(random_pool(tmp_path / "pool", tiny_causal(), experts=NAMES))
    return settings(tmp_path, base=save_tiny_base(tmp_path / "base", tiny_causal()), **SMALL)


def rows(folder: Path) -> dict[str, list[str]]:
    found = {}
    for path in (folder / "run" / "rows").glob("*.json"):
        found[path.stem] = [query["prediction"] for query in json.loads(path.read_text())["result"]["queries"]]
    return found


def test_two_queries_are_evaluated_on_three_ranks(words: list[str], tmp_path: Path) -> None:
    outcome = launch(tmp_path, 3, ["evaluate", *words, "zero_stage=3"])
    assert outcome.code == 0, outcome.err
    sharded = rows(tmp_path)
    assert {name: len(answers) for name, answers in sharded.items()} == dict.fromkeys(ROUTERS[1:-1].split(","), 2)
    outcome = command("evaluate", *words, f"run_dir={tmp_path}/alone")
    assert outcome.code == 0, outcome.err
    (tmp_path / "run").rename(tmp_path / "before")
    (tmp_path / "alone").rename(tmp_path / "run")
    assert rows(tmp_path) == sharded


@pytest.mark.slow
def test_one_query_calibrates_three_ranks_and_a_text_is_answered_by_them(words: list[str], tmp_path: Path) -> None:
    # With its own expert and without it makes two queries.
    outcome = launch(tmp_path, 3, ["calibrate", *words, "zero_stage=3", "tasks.held_in=[copy]"])
    assert outcome.code == 0, outcome.err
    calibration = json.loads((tmp_path / "pool" / "router" / "calibration.json").read_text())
    assert calibration["queries"] == 1
    outcome = launch(tmp_path, 3, ["predict", "Repeat. Input: sun", *words, "zero_stage=3"])
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("answer: ") == 1
