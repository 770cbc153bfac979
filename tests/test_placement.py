"""Which rank owns which expert: the run directory keeps a placement until the configuration asks for another."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from glider_dist.errors import GliderError
from glider_dist.job import Job
from glider_dist.parallel.placement import Placement, contiguous
from glider_dist.parallel.ranks import ALONE
from glider_dist.pool import ExpertPool
from glider_dist.settings import read_config
from glider_dist.testing import random_pool, tiny_causal

HALVES, ENDS = (0, 0, 1, 1), (0, 1, 1, 0)
Placed = Callable[..., tuple[int, ...]]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> ExpertPool:
    return random_pool(tmp_path_factory.mktemp("placed") / "pool", tiny_causal(), experts=4)


@pytest.fixture
def placed(pool: ExpertPool, tmp_path: Path) -> Placed:
    """The owners that a job over two ranks has, or over as many as told."""

    def owners(*words: str, ranks: int = 2) -> tuple[int, ...]:
        job = Job(read_config(None, [f"run_dir={tmp_path}", *words]), "evaluate", ALONE)
        return job._placement(pool, ranks).owner

    return owners


def balanced_by(folder: Path, *tokens: int) -> list[str]:
    """Words of a job whose placement evens out this load."""
    counts = {f"expert_{index}": count for index, count in enumerate(tokens)}
    (folder / "results.json").write_text(json.dumps({"routing": {"glider": {"tokens_per_expert": counts}}}))
    return ["mesh.placement=balanced", f"mesh.load={folder / 'results.json'}"]


def record(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "placement.json").read_text())
    return found


def test_another_kind_of_placement_is_made_and_told(
    placed: Placed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "glider_dist")
    assert placed() == HALVES
    assert (record(tmp_path)["kind"], record(tmp_path)["load_sha256"]) == ("contiguous", None)
    balanced = balanced_by(tmp_path, 9, 5, 4, 1)
    caplog.clear()
    assert placed(*balanced) == ENDS
    assert "balanced by the load " in caplog.text
    assert "(before: contiguous, over 2 ranks)" in caplog.text
    assert placed() == HALVES


def test_another_load_places_anew_and_the_same_one_does_not(placed: Placed, tmp_path: Path) -> None:
    words = balanced_by(tmp_path, 9, 5, 4, 1)
    assert placed(*words) == ENDS
    first = (tmp_path / "placement.json").stat().st_mtime_ns
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert placed(*balanced_by(moved, 9, 5, 4, 1)) == ENDS
    assert (tmp_path / "placement.json").stat().st_mtime_ns == first
    assert placed(*balanced_by(moved, 9, 1, 4, 5)) == HALVES


@pytest.mark.parametrize("kind", ["contiguous", "balanced"])
def test_a_job_that_goes_on_keeps_its_placement_whatever_would_be_made_now(
    kind: str, placed: Placed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = balanced_by(tmp_path, 9, 5, 4, 1) if kind == "balanced" else []
    placed(*words)
    # As another version might have placed them.
    odd = {**record(tmp_path), "experts": {"0": ["expert_3"], "1": ["expert_0", "expert_1", "expert_2"]}}
    (tmp_path / "placement.json").write_text(json.dumps(odd))
    (tmp_path / "results.json").unlink(missing_ok=True)
    caplog.set_level(logging.INFO, "glider_dist")
    caplog.clear()
    assert placed(*words) == (1, 1, 1, 0)
    assert "placement of the experts" not in caplog.text
    assert placed("mesh.placement=contiguous", ranks=4) == (0, 1, 2, 3)


def test_a_file_that_does_not_say_how_it_was_made_stays_only_if_the_same_would_be_made(
    placed: Placed, pool: ExpertPool, tmp_path: Path
) -> None:
    def earlier(owner: tuple[int, ...]) -> None:
        Placement(pool.names, owner, 2).save(tmp_path / "placement.json")
        plain = record(tmp_path)
        del plain["kind"], plain["load_sha256"]
        (tmp_path / "placement.json").write_text(json.dumps(plain))

    earlier(contiguous(pool.names, 2).owner)
    assert placed() == HALVES
    earlier((1, 0, 1, 0))
    assert placed() == HALVES
    earlier(HALVES)
    assert placed(*balanced_by(tmp_path, 9, 5, 4, 1)) == ENDS


def test_a_load_that_was_never_there_is_told(placed: Placed, tmp_path: Path) -> None:
    placed()
    with pytest.raises(GliderError, match=r"mesh\.load=.*gone\.json holds no routing statistics"):
        placed("mesh.placement=balanced", f"mesh.load={tmp_path / 'gone.json'}")


def test_a_pool_that_has_grown_is_placed_anew_and_said_so(
    placed: Placed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert placed() == HALVES
    smaller = {**record(tmp_path), "experts": {"0": ["expert_0", "expert_1"], "1": ["expert_2"]}}
    (tmp_path / "placement.json").write_text(json.dumps(smaller))
    caplog.set_level(logging.INFO, "glider_dist")
    caplog.clear()
    assert placed() == HALVES
    assert "(before: contiguous, over 2 ranks)" in caplog.text
    assert record(tmp_path)["experts"] == {"0": ["expert_0", "expert_1"], "1": ["expert_2", "expert_3"]}
