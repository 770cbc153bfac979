"""Joint training that was broken off goes on: in any stage, split and number of ranks, with the same losses."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_checkpoints as work
from small_jobs import (
    HELD_IN,
    adapters,
    command,
    cores,
    describe_and_index,
    largest_difference,
    settings,
    write_tasks,
)

from glider_dist.pool import ExpertPool
from glider_dist.pool.verify import verify
from glider_dist.testing import LocalRanks, random_pool, tiny_causal
from glider_dist.training import joint

pytestmark = pytest.mark.jobs
STEPS, STOP = 15, 5


def new_job(folder: Path) -> Path:
    write_tasks(folder / "tasks")
    pool = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN, ranks=[4, 3, 9])
    describe_and_index(pool)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return new_job(tmp_path / "job")


def words(folder: Path, base: Path, **changes: Any) -> list[str]:
    small = {
        "train__max_steps": STEPS, "train__save_steps": 2, "train__eval_every": 4, "train__learning_rate": 1e-3,
        "router__kind": "phatgoose", "joint__balance_loss": 0.01,
    }  # fmt: skip
    return settings(folder, **{"base": base, **small, **changes})


def run(folder: Path, base: Path, **changes: Any) -> Any:
    with cores(1):
        return command("train-joint", *words(folder, base, **changes))


def losses(run_dir: Path) -> dict[int, float]:
    """The latest loss of each step."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {int(one["step"]): one["joint/loss"] for one in records if "joint/loss" in one}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """One process, never interrupted."""
    folder = new_job(tmp_path_factory.mktemp("whole") / "job")
    outcome = run(folder, base)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.mark.parametrize(
    ("world", "changes"),
    [(1, {}), (2, {"zero_stage": 3}), (2, {"zero_stage": 1, "mesh__expert_parallel": 2})],
    ids=["one process", "zero 3", "zero 1, expert parallel"],
)
def test_a_job_stopped_on_two_ranks_goes_on_on_another_mesh_with_the_same_losses(
    world: int, changes: dict[str, Any], folder: Path, base: Path, whole: Path,
    local_ranks: Callable[[int], LocalRanks],
) -> None:  # fmt: skip
    first = words(folder, base, zero_stage=2, mesh__expert_parallel=2)
    found = local_ranks(2).run(work.stage, "train-joint", first, STOP, 1, signal.SIGUSR1)
    assert found == ["stopped: SIGUSR1"] * 2
    if world == 1:
        outcome = run(folder, base, **changes)
        assert outcome.code == 0, outcome.err
        assert f"goes on after step {STOP}" in outcome.err
    else:
        assert local_ranks(2).run(work.stage, "train-joint", words(folder, base, **changes)) == ["done"] * 2
    expected, again = losses(whole / "run"), losses(folder / "run")
    assert again.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step in range(1, STOP + 11):
        assert again[step] == pytest.approx(expected[step], rel=1e-6)
    assert largest_difference(adapters(whole / "pool"), adapters(folder / "pool")) <= 1e-4
    assert not (folder / "run" / "checkpoints" / "joint").exists()


@pytest.mark.parametrize("turn", [6, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (2, 15))])
def test_a_killed_job_ends_with_the_same_bits_and_the_pool_is_whole_meanwhile(turn, folder, base, whole):
    before = adapters(folder / "pool")
    with work.at_turn(turn, work.killed), pytest.raises(work.Killed):
        run(folder, base)
    assert verify(ExpertPool.open(folder / "pool")) == []
    assert largest_difference(before, adapters(folder / "pool")) == 0.0
    outcome = run(folder, base)
    assert outcome.code == 0, outcome.err
    assert losses(whole / "run") == losses(folder / "run")
    assert largest_difference(adapters(whole / "pool"), adapters(folder / "pool")) == 0.0


def test_killed_while_its_experts_take_their_places_the_job_is_done_and_not_done_twice(
    folder: Path, base: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = joint.move_into_place

    def dies(pool: ExpertPool) -> bool:
        if (pool.path / ".joint" / "complete.json").exists():
            raise work.Killed
        return once(pool)

    monkeypatch.setattr(joint, "move_into_place", dies)
    with pytest.raises(work.Killed):
        run(folder, base)
    monkeypatch.undo()
    outcome = run(folder, base)
    assert outcome.code == 0, outcome.err
    assert "done already" in outcome.err
    assert largest_difference(adapters(whole / "pool"), adapters(folder / "pool")) == 0.0


@pytest.mark.parametrize("part", ["experts/copy", "job"])
def test_a_damaged_file_of_one_expert_or_of_the_job_takes_all_back_to_the_older_step(part, folder, base, whole):
    with work.at_turn(8, work.killed), pytest.raises(work.Killed):
        run(folder, base)
    files = sorted((folder / "run" / "checkpoints" / "joint" / part).glob("step-*"))
    assert [path.name for path in files] == ["step-00000004.safetensors", "step-00000006.safetensors"]
    content = bytearray(files[-1].read_bytes())
    content[-3] ^= 1
    files[-1].write_bytes(bytes(content))
    outcome = run(folder, base)
    assert outcome.code == 0, outcome.err
    assert f"{files[-1]} has changed since it was written (its checksum differs); step 4 is used" in outcome.err
    assert largest_difference(adapters(whole / "pool"), adapters(folder / "pool")) == 0.0


def test_what_changed_since_the_checkpoint_is_named_and_the_pool_stays(folder, base):
    with work.at_turn(4, work.killed), pytest.raises(work.Killed):
        run(folder, base)
    before = adapters(folder / "pool")
    outcome = run(folder, base, train__learning_rate=3e-4)
    assert outcome.code == 2
    assert "learning_rate of the recipe of experts changed from 0.001 to 0.0003 since" in outcome.errors[0]
    path = folder / "tasks" / "tasks" / "upper" / "train.jsonl"
    path.write_text(path.read_text().replace("sun", "moon"))
    outcome = run(folder, base)
    assert outcome.code == 2
    assert "tasks/upper/train.jsonl in tasks.path (upper) changed since" in outcome.errors[0]
    assert largest_difference(before, adapters(folder / "pool")) == 0.0
    shutil.rmtree(folder / "run" / "checkpoints" / "joint")
    assert run(folder, base).code == 0


def test_settings_that_change_no_weight_neither_block_a_resume_nor_repeat_a_training(folder, base):
    with work.at_turn(9, work.killed), pytest.raises(work.Killed):
        run(folder, base)
    file = Path(__file__).resolve().parents[1] / "launch_configs" / "deepspeed" / "zero0.json"
    outcome = run(folder, base, joint__deepspeed=file, train__keep_last=3)
    assert outcome.code == 0, outcome.err
    assert "joint training goes on after step" in outcome.err
    trained = adapters(folder / "pool")
    outcome = run(folder, base, train__save_minutes=5, joint__recalibrate=False)
    assert outcome.code == 0, outcome.err
    assert "done already" in outcome.err
    assert largest_difference(trained, adapters(folder / "pool")) == 0.0


def test_the_multitask_baseline_trains_on_two_ranks_of_which_one_has_its_weights(
    folder: Path, base: Path, local_ranks: Callable[[int], LocalRanks]
) -> None:
    changes = {"pool": folder / "multitask", "joint__multitask": True, "train__max_steps": 8}
    given = words(folder, base, zero_stage=2, **changes)
    assert local_ranks(2).run(work.stage, "train-joint", given) == ["done"] * 2
    assert ExpertPool.open(folder / "multitask").names == ("multitask",)
