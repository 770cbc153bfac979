"""What routing and evaluation lack is told in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import Refused, says
from small_jobs import HELD_IN, describe_and_index

from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import GATE_FILE
from glider_dist.testing import random_pool, tiny_causal


@pytest.mark.parametrize("stage", ["evaluate", "predict", "calibrate"])
def test_a_missing_gate_is_refused_where_gates_are_needed(stage: str, refused: Refused, pool: ExpertPool) -> None:
    (pool.path / "experts" / "last" / GATE_FILE).unlink()
    says(refused(stage, router__kind="phatgoose"), "'last' has no gate", "1 of 3", "train-gates")


@pytest.mark.parametrize("stage", ["evaluate", "predict", "calibrate"])
def test_more_experts_per_token_than_the_pool_has_are_refused(
    stage: str, refused: Refused, pool: ExpertPool
) -> None:
    says(refused(stage, "router.top_k=4"), "router.top_k=4", "3 experts")


def test_an_unknown_router_is_refused_with_the_ones_there_are(refused: Refused, pool: ExpertPool) -> None:
    says(refused("predict", "router.kind=magic"), "router.kind", "'magic'", "phatgoose")
    says(refused("evaluate", "evaluate.routers=[base,magic]"), "'magic'", "phatgoose")
    says(refused("evaluate", "evaluate.routers=[base,base]"), "evaluate.routers", "twice")
    says(refused("evaluate", "evaluate.routers=[]"), "evaluate.routers")


@pytest.mark.parametrize("stage", ["train-experts", "describe", "index", "calibrate", "evaluate"])
def test_a_run_directory_that_cannot_be_made_is_refused_before_anything_is_done(
    stage: str, refused: Refused, folder: Path, pool: ExpertPool
) -> None:
    says(refused(stage, run_dir=folder / "tasks" / "tasks.json" / "run"), "run_dir", "no folder")
    says(refused(stage, run_dir=folder / "tasks" / "tasks.json"), "run_dir", "no folder")


def test_the_oracle_cannot_answer_a_typed_text(refused: Refused, pool: ExpertPool) -> None:
    says(refused("predict", "router.kind=oracle"), "oracle", "task")


@pytest.mark.parametrize("text", ["", "   "])
def test_there_must_be_a_text_to_answer(text: str, refused: Refused, pool: ExpertPool) -> None:
    says(refused("predict", text=text), "no text")


def test_a_choice_longer_than_the_limit_is_named_before_anything_is_answered(
    refused: Refused, folder: Path, pool: ExpertPool
) -> None:
    path = folder / "tasks" / "tasks" / "copy" / "test.jsonl"
    path.write_text(json.dumps({"id": "x", "input": "i", "target": "a", "choices": ["a", "b" * 300]}) + "\n")
    message = refused("evaluate", "evaluate.rank_classification=true", "evaluate.routers=[base]")
    says(message, "'copy'", "choices of example 'x'", "302 tokens")


def test_half_a_surrogate_pair_is_refused(refused: Refused, folder: Path, pool: ExpertPool) -> None:
    says(refused("predict", text="Repeat. Input: \udcff"), "the text to answer", "surrogate")
    path = folder / "tasks" / "tasks" / "copy" / "test.jsonl"
    path.write_text('{"id": "x", "input": "\\ud800", "target": "x"}\n')
    says(refused("evaluate"), path, "line 1", "input", "surrogate")


def test_evaluating_a_task_that_has_no_expert_yet_is_refused(refused: Refused, folder: Path) -> None:
    random_pool(folder / "pool", tiny_causal(), experts=HELD_IN[:2])
    says(refused("evaluate", "evaluate.routers=[base]"), "'last'", "train-experts")


def test_calibrating_on_a_single_expert_is_refused(refused: Refused, folder: Path) -> None:
    describe_and_index(random_pool(folder / "pool", tiny_causal(), experts=HELD_IN[:1]))
    says(refused("calibrate", router__top_k=1), "at least two experts")


DAMAGES = [b"[]", b"null", b"{", b"\xff\xfe"]


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
@pytest.mark.parametrize("file", ["pool.json", "experts/upper/card.json", "router/calibration.json"])
def test_a_damaged_file_of_the_pool_is_named(
    file: str, damage: bytes, refused: Refused, folder: Path, pool: ExpertPool
) -> None:
    (pool.path / file).write_bytes(damage)
    says(refused("evaluate"), pool.path / file)


def test_a_pool_without_its_base_or_with_odd_shapes_is_refused(refused: Refused, pool: ExpertPool) -> None:
    path = pool.path / "pool.json"
    value = json.loads(path.read_text())
    for change in ({"fingerprint": {"sites": {"q_proj": 3}}}, {"fingerprint": []}):
        path.write_text(json.dumps({**value, **change}))
        says(refused("evaluate"), path)
    path.write_text(json.dumps({"format": value["format"]}))
    says(refused("evaluate"), path, "base")


def test_a_calibration_without_numbers_is_refused(refused: Refused, pool: ExpertPool) -> None:
    path = pool.router_dir / "calibration.json"
    path.write_text(json.dumps({"alpha_in": "a lot"}))
    says(refused("predict"), "calibration.json", "alpha_in='a lot'", "run calibrate")


@pytest.mark.parametrize("descriptions", ["text", [1], [" "]])
def test_descriptions_that_are_no_sentences_are_refused(
    descriptions: Any, refused: Refused, pool: ExpertPool
) -> None:
    pool.expert("upper").update_card(descriptions=descriptions)
    for stage in ("index", "evaluate"):
        says(refused(stage), "upper/card.json", "no list of sentences")


@pytest.mark.parametrize("key", ["calibrate.alphas=[.nan]", "calibrate.alphas=[.inf]", "router.threshold=.nan"])
def test_settings_that_are_no_finite_numbers_are_refused(key: str, refused: Refused, pool: ExpertPool) -> None:
    says(refused("calibrate", key), key.split("=")[0], "finite")
