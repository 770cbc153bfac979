from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glider_dist.config import Config, TasksConfig
from glider_dist.errors import GliderError
from glider_dist.tasks.source import load_tasks


def _folder(folder: Path, *records: dict[str, Any]) -> TasksConfig:
    tasks = [{"definition": "Do it.", "split": "held_in", **record} for record in records]
    (folder / "tasks.json").write_text(json.dumps({"tasks": tasks}), encoding="utf-8")
    return TasksConfig(source="jsonl", path=str(folder))


def _names(tasks) -> list[str]:
    return [task.name for task in tasks]


def test_empty_lists_take_every_task_of_each_split():
    suite = load_tasks(TasksConfig(), seed=0)
    assert {task.split for task in suite.held_in} == {"held_in"}
    assert {task.split for task in suite.held_out} == {"held_out"}
    assert suite.all == suite.held_in + suite.held_out


def test_named_tasks_keep_the_order_of_the_configuration():
    suite = load_tasks(TasksConfig(held_in=["opposite", "giver"], held_out=["receiver"]), seed=0)
    assert _names(suite.held_in) == ["opposite", "giver"]
    assert _names(suite.held_out) == ["receiver"]


def test_naming_held_out_tasks_alone_still_takes_every_held_in_task():
    suite = load_tasks(TasksConfig(held_out=["receiver"]), seed=0)
    assert _names(suite.held_in) == _names(load_tasks(TasksConfig(), seed=0).held_in)


def test_a_held_in_task_that_is_named_as_held_out_moves_there():
    suite = load_tasks(TasksConfig(held_out=["giver"]), seed=0)
    assert "giver" not in _names(suite.held_in)
    assert [(task.name, task.split) for task in suite.held_out] == [("giver", "held_out")]


def test_seed_and_limit_reach_the_procedural_examples():
    first, second = (load_tasks(TasksConfig(held_in=["giver"], limit=7), seed).held_in[0] for seed in (0, 1))
    assert len(first.examples("train")) == 7
    assert first.examples("train") != second.examples("train")


def test_a_name_that_does_not_exist_is_an_error_with_the_nearest_name():
    with pytest.raises(GliderError, match=r"tasks.held_in names 'last_wrod'.*nearest name is 'last_word'"):
        load_tasks(TasksConfig(held_in=["last_wrod"]), seed=0)
    with pytest.raises(GliderError, match=r"tasks.held_out names '12'"):
        load_tasks(TasksConfig(held_out=["12"]), seed=0)


def test_naming_a_task_twice_is_an_error():
    with pytest.raises(GliderError, match=r"names 'giver' twice"):
        load_tasks(TasksConfig(held_in=["giver", "giver"]), seed=0)
    with pytest.raises(GliderError, match=r"in tasks.held_in and in tasks.held_out"):
        Config(tasks=TasksConfig(held_in=["giver"], held_out=["giver"])).validate()


def test_no_held_out_task_is_legal_and_no_held_in_task_is_an_error(tmp_path):
    assert load_tasks(_folder(tmp_path, {"name": "a"}), seed=0).held_out == ()
    with pytest.raises(GliderError, match="no task is held in"):
        load_tasks(_folder(tmp_path, {"name": "a", "split": "held_out"}), seed=0)


def test_a_task_for_evaluation_only_is_refused_as_held_in(tmp_path):
    cfg = _folder(tmp_path, {"name": "a"}, {"name": "bbh_b", "split": "held_out"})
    assert _names(load_tasks(cfg, seed=0).held_out) == ["bbh_b"]
    cfg.held_in = ["bbh_b"]
    with pytest.raises(GliderError, match=r"'bbh_b' is for evaluation only"):
        load_tasks(cfg, seed=0)
    with pytest.raises(GliderError, match=r"'bbh_b' is for evaluation only"):
        load_tasks(_folder(tmp_path, {"name": "bbh_b"}), seed=0)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "/a", "a\\b", "a\0b"])
def test_a_task_name_that_cannot_name_a_folder_is_refused(tmp_path, name):
    with pytest.raises(GliderError, match="cannot name a folder"):
        load_tasks(_folder(tmp_path, {"name": name}), seed=0)


def test_two_tasks_of_one_name_are_refused(tmp_path):
    with pytest.raises(GliderError, match=r"two tasks are called 'a'"):
        load_tasks(_folder(tmp_path, {"name": "a"}, {"name": "a"}), seed=0)


@pytest.mark.parametrize("source", ["jsonl", "datasets"])
def test_a_source_that_needs_a_path_says_so(source):
    with pytest.raises(GliderError, match=rf"tasks.source={source} needs tasks.path"):
        load_tasks(TasksConfig(source=source), seed=0)


def test_an_unknown_source_is_refused():
    with pytest.raises(GliderError, match=r"tasks.source is 'csv'"):
        load_tasks(TasksConfig(source="csv"), seed=0)
