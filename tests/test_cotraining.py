"""Many experts trained together give what each gives alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cotraining_worker as worker
import pytest
import torch
from small_jobs import cores, finish, free_port, program, start

from glider_dist.model.engine import FrozenBase
from glider_dist.parallel.ranks import ALONE
from glider_dist.training.batches import micro_batches

Found = dict[str, dict[str, Any]]


def alone(dtype: torch.dtype, kind: str) -> Found:
    base = worker.base_model(dtype)
    frozen = FrozenBase(base, ALONE, 0)
    found: Found = {}
    for name in worker.SIZES:
        found |= worker.train(frozen, base, kind, [worker.trainee(name)], slots=1)
    return found


@pytest.fixture(scope="module")
def separate() -> dict[str, dict[str, Found]]:
    torch.set_num_threads(1)
    return {
        dtype: {kind: alone(getattr(torch, dtype), kind) for kind in worker.KINDS}
        for dtype in ("float64", "float32")
    }


def together(tmp_path: Path, world: int, zero_stage: int, dtype: str, replicas: int = 1) -> dict[str, Found]:
    file = tmp_path / "found.pt"
    words = [program("torchrun"), "--nproc_per_node", str(world), "--master_port", str(free_port())]
    with cores(world):
        process = start([*words, worker.__file__, str(zero_stage), dtype, str(replicas), str(file)], tmp_path)
    outcome = finish(process)
    assert outcome.code == 0, outcome.err
    found: dict[str, Found] = torch.load(file)
    return found


def check_equal(one: Found, other: Found, tolerance: float) -> None:
    """Weights within ``tolerance`` of each tensor's largest, and the same choices."""
    assert one.keys() == other.keys()
    for name, here in one.items():
        there = other[name]
        assert here["best_step"] == there["best_step"]
        assert [step for step, _ in here["validation"]] == [step for step, _ in there["validation"]]
        assert here["losses"] == pytest.approx(there["losses"], rel=max(tolerance, 1e-12))
        for key, value in here["tensors"].items():
            scale = float(value.abs().max()) or 1.0
            assert float((value - there["tensors"][key]).abs().max()) <= tolerance * scale, (name, key)


SLOW = pytest.mark.slow
RANKS = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="ranks cannot be pinned to cores here")


@pytest.mark.jobs
@RANKS
@pytest.mark.parametrize(
    ("world", "zero_stage"),
    [(2, 0), *(pytest.param(*way, marks=SLOW) for way in ((1, 0), (3, 0), (2, 3), (3, 3)))],
)
def test_six_unequal_tasks_together_are_each_trained_as_if_alone(world, zero_stage, separate, tmp_path):
    found = together(tmp_path, world, zero_stage, "float64")
    for kind in worker.KINDS:
        check_equal(separate["float64"][kind], found[kind], 1e-10)
        assert len({len(one["losses"]) for one in found[kind].values()}) == 2  # step counts differ


@pytest.mark.jobs
@RANKS
@pytest.mark.parametrize(
    ("world", "zero_stage", "replicas"),
    [(2, 3, 2), *(pytest.param(*way, marks=SLOW) for way in ((2, 0, 2), (3, 3, 3), (4, 0, 2), (4, 3, 2)))],
)
def test_replicas_that_share_the_rows_of_each_step_train_as_one_rank_would(
    world, zero_stage, replicas, separate, tmp_path
):
    found = together(tmp_path, world, zero_stage, "float64", replicas)
    for kind in worker.KINDS:
        check_equal(separate["float64"][kind], found[kind], 1e-10)


@pytest.mark.jobs
@RANKS
@pytest.mark.parametrize(("world", "zero_stage"), [(2, 0), pytest.param(3, 3, marks=SLOW)])
def test_in_fp32_only_rounding_differs(world, zero_stage, separate, tmp_path):
    found = together(tmp_path, world, zero_stage, "float32")
    for kind in worker.KINDS:
        check_equal(separate["float32"][kind], found[kind], 1e-3)


def test_each_expert_and_each_gate_learns(separate):
    for kind, found in separate["float64"].items():
        for name, one in found.items():
            assert min(one["losses"][-10:]) < one["losses"][0], (kind, name)
            assert one["validation"][-1][0] == len(one["losses"])
    gate = separate["float64"]["gate"]["five"]["tensors"]
    # The expert lacks the last site, where its gate stays zero.
    assert [key for key, value in gate.items() if not value.any()] == [list(gate)[-1]]


def test_a_step_of_the_six_shares_forwards():
    chosen = {slot: worker.trainee(name).draw() for slot, name in enumerate(worker.SIZES)}
    found = micro_batches(chosen, worker.MIXED)
    assert len(found) < len(chosen)
    assert any(len(set(micro.slots)) > 1 for micro in found)
    assert sum(len(micro.items) for micro in found) == sum(map(len, chosen.values()))
