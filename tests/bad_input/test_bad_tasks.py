"""Tasks that cannot be used are named with file and line, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import Refused, says
from small_jobs import HELD_IN

from glider_dist.pool import ExpertPool
from glider_dist.testing import random_pool, tiny_causal


def test_a_missing_tasks_folder_is_named(refused: Refused, folder: Path) -> None:
    says(refused("train-experts", f"tasks.path={folder}/gone"), "tasks.path", f"{folder}/gone")


def test_a_folder_without_tasks_is_named(refused: Refused, folder: Path) -> None:
    (folder / "tasks" / "tasks.json").unlink()
    says(refused("train-experts"), folder / "tasks", "tasks.json")


def test_an_unknown_task_is_refused_with_the_nearest_name(refused: Refused) -> None:
    says(refused("train-experts", "tasks.held_in=[uper]"), "'uper'", "'upper'")


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_missing_split_is_named_with_its_file(part: str, refused: Refused, folder: Path) -> None:
    path = folder / "tasks" / "tasks" / "upper" / f"{part}.jsonl"
    path.unlink()
    says(refused("train-experts"), "'upper'", part, path)


def test_a_missing_test_split_is_named_with_its_file(refused: Refused, folder: Path, pool: ExpertPool) -> None:
    path = folder / "tasks" / "tasks" / "first" / "test.jsonl"
    path.unlink()
    says(refused("evaluate"), "'first'", "test", path)


def test_a_malformed_line_is_named_with_file_and_number(refused: Refused, folder: Path) -> None:
    path = folder / "tasks" / "tasks" / "last" / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], lines[4][:-5], *lines[5:]]))
    says(refused("train-experts"), path, "line 5", "not JSON")


def test_an_empty_task_is_named_with_its_file(refused: Refused, folder: Path) -> None:
    path = folder / "tasks" / "tasks" / "copy" / "train.jsonl"
    path.write_text("\n \n")
    says(refused("train-experts"), path, "empty", "'copy'")


@pytest.mark.parametrize(
    ("stage", "part"), [("train-experts", "train"), ("train-gates", "train"), ("evaluate", "test")]
)
def test_a_target_longer_than_the_limit_is_named_with_its_task_its_id_and_its_length(
    stage: str, part: str, refused: Refused, folder: Path, request: pytest.FixtureRequest
) -> None:
    if stage != "train-experts":
        random_pool(folder / "pool", tiny_causal(), experts=HELD_IN, gates=stage == "evaluate")
    path = folder / "tasks" / "tasks" / "upper" / f"{part}.jsonl"
    path.write_text(path.read_text() + json.dumps({"id": "long", "input": "sun", "target": "SUN" * 70}) + "\n")
    message = refused(stage, tasks__max_length=200, evaluate__queries=5, evaluate__routers="[base]")
    says(message, "'upper'", part, "example 'long'", "212 tokens", "tasks.max_length is 200")


@pytest.mark.parametrize("name", ["../evil", "a/b", "a\\\\b", ".hidden", ""])
def test_a_task_whose_name_cannot_name_a_folder_is_refused(name: str, refused: Refused, folder: Path) -> None:
    path = folder / "tasks" / "tasks.json"
    path.write_text(path.read_text().replace('"copy"', f'"{name}"'))
    says(refused("train-experts"), "name", repr(json.loads(f'"{name}"')))


def test_a_task_whose_name_the_pool_cannot_take_is_refused_before_training(refused: Refused, folder: Path) -> None:
    path = folder / "tasks" / "tasks.json"
    path.write_text(path.read_text().replace('"copy"', '"copy all"'))
    (folder / "tasks" / "tasks" / "copy").rename(folder / "tasks" / "tasks" / "copy all")
    says(refused("train-experts"), "'copy all'")


def test_two_tasks_of_one_name_are_refused(refused: Refused, folder: Path) -> None:
    path = folder / "tasks" / "tasks.json"
    path.write_text(path.read_text().replace('"copy"', '"upper"'))
    says(refused("train-experts"), "two tasks", "'upper'")
