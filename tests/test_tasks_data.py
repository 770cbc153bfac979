"""The real task data: every line of it, where it is at hand."""

from __future__ import annotations

import pytest
from reference_data import reference

from glider_dist.config import TasksConfig
from glider_dist.errors import GliderError
from glider_dist.tasks.source import load_tasks

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def folder() -> str:
    return str(reference("data"))


def test_every_line_of_the_real_data_is_accepted(folder):
    suite = load_tasks(TasksConfig(source="jsonl", path=folder), seed=0)
    assert (len(suite.held_in), len(suite.held_out)) == (48, 43)
    assert sum(len(task.examples("train")) for task in suite.held_in) == 37934
    assert sum(len(task.examples("validation")) for task in suite.held_in) == 4800
    assert sum(len(task.examples("test")) for task in suite.all) == 4800 + 1600 + 6511


def test_real_tasks_have_six_instructions_and_held_in_ones_two_descriptions(folder):
    suite = load_tasks(TasksConfig(source="jsonl", path=folder), seed=0)
    assert {len(task.instructions) for task in suite.all} == {6}
    assert {len(task.descriptions) for task in suite.held_in} == {2}


def test_the_31_big_bench_tasks_and_no_others_are_for_evaluation_only(folder):
    suite = load_tasks(TasksConfig(source="jsonl", path=folder), seed=0)
    guarded = [task for task in suite.all if task.evaluation_only]
    assert len(guarded) == 31
    assert all(task.name.startswith(("bigbench_", "bbh_")) for task in guarded)
    with pytest.raises(GliderError, match="for evaluation only"):
        load_tasks(TasksConfig(source="jsonl", path=folder, held_in=["bbh_snarks"]), seed=0)


def test_a_held_out_task_has_nothing_to_train_on(folder):
    cfg = TasksConfig(source="jsonl", path=folder, held_in=["ii_rhymes"])
    with pytest.raises(GliderError, match="no train split"):
        load_tasks(cfg, seed=0).held_in[0].examples("train")


def test_a_limit_holds_for_every_task(folder):
    cfg = TasksConfig(source="jsonl", path=folder, held_in=["ii_antonyms", "snips_intent"], limit=24)
    assert {len(task.examples(part)) for task in load_tasks(cfg, 0).held_in for part in ("train", "test")} == {24}
