"""``pool verify`` on the router's files and on cards: what each must hold, and what it was made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import command, describe_and_index

from glider_dist.model.stored import ACTIVATION_FILE, write_activations
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import CARD_FILE
from glider_dist.pool.calibration import CALIBRATION_FILE, made_for, read_calibration
from glider_dist.semantics.index import FILE
from glider_dist.testing import random_pool, tiny_causal

GOOD: dict[str, Any] = {"alpha_in": 20.0, "alpha_out": 3, "threshold": 0.5}


@pytest.fixture
def pool(tmp_path: Path) -> ExpertPool:
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=["a", "b"], sites=[["q_proj"], ["v_proj"]])
    describe_and_index(pool)
    return pool


def calibrate(pool: ExpertPool, value: Any) -> None:
    (pool.router_dir / CALIBRATION_FILE).write_text(json.dumps(value))


def problems(pool: ExpertPool) -> list[str]:
    outcome = command("pool", "verify", str(pool.path))
    lines = outcome.out.splitlines()
    if outcome.code == 0:
        assert lines == [f"{len(ExpertPool.open(pool.path))} experts, no problems"]
        return []
    assert outcome.code == 2
    assert outcome.errors == [f"pool {pool.path} has {len(lines)} problems, listed above"]
    return lines


def test_a_calibration_for_the_pool_as_it_is_passes(pool: ExpertPool) -> None:
    calibrate(pool, GOOD)
    assert problems(pool) == []
    calibrate(pool, {**GOOD, "made_for": made_for(pool, pool.router_dir / FILE)})
    assert problems(pool) == []


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "must hold a JSON object"),
        ({"alpha_in": 1.0, "alpha_out": 1.0}, "has no threshold"),
        ({**GOOD, "alpha_in": "20"}, "alpha_in is '20', not a number"),
        ({**GOOD, "alpha_out": True}, "alpha_out is True, not a number"),
        ({**GOOD, "alpha_in": float("nan")}, "alpha_in is nan, not a number"),
        ({**GOOD, "alpha_out": -1.0}, "alpha_out is -1.0, but must be at least 0"),
        ({**GOOD, "threshold": 1.5}, "threshold is 1.5, but must be in [-1.011, 1.011]"),
        ({**GOOD, "alpha_in": 1.0}, "alpha_in=1.0 is below alpha_out=3"),
        ({**GOOD, "made_for": "me"}, "is stale: the pool's experts changed"),
    ],
)
def test_a_calibration_that_cannot_be_right_is_told(value: Any, says: str, pool: ExpertPool) -> None:
    calibrate(pool, value)
    (line,) = problems(pool)
    assert says in line
    assert line.startswith(str(pool.router_dir / CALIBRATION_FILE))
    assert line.endswith("run calibrate again")


def test_a_calibration_and_an_index_for_other_experts_are_named(pool: ExpertPool) -> None:
    calibrate(pool, {**GOOD, "made_for": made_for(pool, pool.router_dir / FILE)})
    pool.remove("b")
    index, calibration = problems(pool)
    assert index == f"{pool.router_dir / FILE} was made for other experts (b); run index again"
    assert "calibration.json is stale: the pool's experts changed after it was made" in calibration


def test_a_calibration_made_with_another_index_or_none_is_named(pool: ExpertPool) -> None:
    calibrate(pool, {**GOOD, "made_for": made_for(pool, pool.router_dir / FILE)})
    pool.expert("a").update_card(descriptions=["It is another one."])
    (stale,) = problems(pool)
    assert "made from descriptions that have changed since" in stale
    (pool.router_dir / FILE).unlink()
    (missing,) = problems(pool)
    assert "embeddings.safetensors does not exist; run index" in missing


def test_average_activations_leave_a_calibration_as_it_is(
    pool: ExpertPool, caplog: pytest.LogCaptureFixture
) -> None:
    calibrate(pool, {**GOOD, "made_for": made_for(pool, pool.router_dir / FILE)})
    expert = pool.expert("a")
    write_activations(expert, {site: torch.zeros(shape[1]) for site, shape in expert.shapes().items()}, "a test")
    assert problems(pool) == []
    assert read_calibration(pool, [])["threshold"] == 0.5
    assert not caplog.records
    expert.write_gate({site: torch.zeros(shape[1]) for site, shape in expert.shapes().items()})
    assert "is stale: the pool's experts changed" in problems(pool)[0]


def test_every_file_that_a_card_has_a_hash_of_is_checked(pool: ExpertPool) -> None:
    expert = pool.expert("a")
    write_activations(expert, {site: torch.zeros(shape[1]) for site, shape in expert.shapes().items()}, "a test")
    assert problems(pool) == []
    path = expert.folder / ACTIVATION_FILE
    path.write_bytes(path.read_bytes() + b" ")
    assert problems(pool) == [f"{path} has changed: its sha256 is not the one in the card"]
    path.unlink()
    assert problems(pool) == [f"{path} is missing, though the card has its hash"]


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ("[]", "must hold a JSON object, not []"),
        ('{"files": [1]}', "is no card of an expert"),
        ('{"files": null}', "is no card of an expert"),
        ('{"summary": "large"}', "is no card of an expert"),
    ],
)
def test_a_card_that_is_none_is_one_sentence_everywhere(card: str, says: str, pool: ExpertPool) -> None:
    path = pool.expert("a").folder / CARD_FILE
    path.write_text(card)
    assert problems(pool) == [f"{path} {says}; remove the expert and add it again"]
    for words in (["ls"], ["show"]):
        outcome = command("pool", *words, str(pool.path), *(["a"] if words == ["show"] else []))
        assert outcome.code == 2
        assert says in outcome.errors[0]


@pytest.mark.parametrize("descriptions", ["One sentence.", ["One.", ""], [1]])
def test_descriptions_that_no_index_can_take_are_told(descriptions: Any, pool: ExpertPool) -> None:
    pool.expert("a").update_card(descriptions=descriptions)
    (line,) = problems(pool)
    assert "are no list of sentences" in line
