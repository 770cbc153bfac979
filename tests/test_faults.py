"""Killed, full, damaged, changed, contended: what is on disk can be read, and one sentence says what to do."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rank_checkpoints as work
from small_jobs import (
    HELD_IN,
    Outcome,
    adapters,
    command,
    cores,
    describe_and_index,
    finish,
    kill,
    largest_difference,
    settings,
    start,
    write_tasks,
)

from glider_dist.errors import GliderError
from glider_dist.evaluation import evaluate
from glider_dist.pool import ExpertPool
from glider_dist.pool.files import clear_up
from glider_dist.pool.lock import hold_all
from glider_dist.pool.verify import verify
from glider_dist.testing import LocalRanks, random_pool, tiny_causal
from glider_dist.training.background import Background

LONG: dict[str, Any] = {"train__max_steps": 40, "train__eval_every": 20, "train__save_steps": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    write_tasks(folder / "tasks")
    for stage in ("train-experts", "train-gates"):
        assert run(stage, folder, base).code == 0
    return adapters(folder / "pool")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tasks(tmp_path / "tasks")
    return tmp_path


def run(stage: str, folder: Path, base: Path, **changes: Any) -> Outcome:
    with cores(1):
        return command(stage, *settings(folder, **{"base": base, **LONG, **changes}))


def broken_off(stage: str, folder: Path, base: Path, turn: int, **changes: Any) -> None:
    """A job in this process that ends at a turn, with everything before written."""
    with work.at_turn(turn, work.killed), pytest.raises(work.Killed):
        run(stage, folder, base, **changes)


def only(whole: dict[str, Any], part: str) -> dict[str, Any]:
    return {name: {key: value for key, value in tensors.items() if part in key} for name, tensors in whole.items()}


# Kills --------------------------------------------------------------------------------------------------------


@pytest.mark.jobs
def test_kill_9_of_one_of_two_ranks_loses_no_step_before_the_last_checkpoint(
    folder: Path, base: Path, whole: Any, local_ranks: Callable[[int], LocalRanks]
) -> None:
    words = settings(folder, base=base, **LONG)
    with LocalRanks(2, timeout_s=60) as ranks, pytest.raises(GliderError, match="rank 1: the process ended"):
        ranks.run(work.stage, "train-experts", words, 25, 1, signal.SIGKILL)
    steps = {path.name for path in (folder / "run" / "checkpoints" / "expert").glob("*/step-*")}
    assert steps
    assert verify(ExpertPool.open(folder / "pool")) == []
    assert local_ranks(2).run(work.stage, "train-experts", words) == ["done"] * 2
    assert largest_difference(only(whole, "lora"), adapters(folder / "pool")) == 0.0
    assert verify(ExpertPool.open(folder / "pool")) == []


@pytest.mark.jobs
def test_what_is_missing_is_decided_by_rank_0_where_another_node_sees_an_expert_late(
    folder: Path, base: Path, local_ranks: Callable[[int], LocalRanks]
) -> None:
    random_pool(folder / "pool", tiny_causal(), HELD_IN, base=str(base))
    words = settings(folder, base=base)
    found = local_ranks(2).run(work.stage_seen_late, "train-experts", words, HELD_IN[0])
    assert found == ["done"] * 2


@pytest.mark.jobs
def test_ranks_that_will_share_the_experts_later_train_them_without_waiting_for_each_other(
    folder: Path, base: Path, local_ranks: Callable[[int], LocalRanks]
) -> None:
    words = [*settings(folder, base=base), "mesh.expert_parallel=2"]
    for name in ("train-experts", "train-gates"):
        assert local_ranks(2).run(work.stage_agreeing, name, words) == [0, 0]


@pytest.mark.jobs
def test_kill_9_again_and_again_while_files_are_written_leaves_a_pool_that_can_be_read(folder, base, whole):
    words = [sys.executable, "-m", "glider_dist", "train-experts", *settings(folder, base=base, **LONG)]
    experts = folder / "run" / "checkpoints" / "expert"
    for wanted in ("*/step-*", "*/.step-*.tmp"):
        with cores(1):
            process = start(words, folder)
        deadline = time.monotonic() + 180
        while process.poll() is None and not list(experts.glob(wanted)):
            assert time.monotonic() < deadline
        kill(process)
        finish(process)
        assert verify(ExpertPool.open(folder / "pool")) == []
    outcome = run("train-experts", folder, base)
    assert outcome.code == 0, outcome.err
    assert largest_difference(only(whole, "lora"), adapters(folder / "pool")) == 0.0
    assert verify(ExpertPool.open(folder / "pool")) == []
    assert not list((folder / "run" / "checkpoints").rglob("*.*"))


def test_killed_between_its_last_step_and_the_pool_an_expert_is_stored_at_the_next_start(
    folder: Path, base: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = ExpertPool.write

    def dies(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "upper":
            raise work.Killed
        return once(self, name, *args, **kwargs)

    monkeypatch.setattr(ExpertPool, "write", dies)
    with pytest.raises(work.Killed):
        run("train-experts", folder, base)
    monkeypatch.undo()
    before = set(ExpertPool.open(folder / "pool").names)
    assert "upper" not in before
    outcome = run("train-experts", folder, base)
    assert outcome.code == 0, outcome.err
    assert "upper goes on after step 40" in outcome.err
    assert largest_difference(only(whole, "lora"), adapters(folder / "pool")) == 0.0


def test_killed_between_the_pool_and_its_checkpoint_an_expert_leaves_none_behind(folder, base, monkeypatch):
    monkeypatch.setattr("glider_dist.training.checkpoint.Checkpoints.remove", lambda self, name: None)
    assert run("train-experts", folder, base).code == 0
    monkeypatch.undo()
    left = folder / "run" / "checkpoints" / "expert"
    assert len(list(left.iterdir())) == 3
    assert run("train-experts", folder, base).code == 0
    assert list(left.iterdir()) == []


def test_what_a_killed_writer_left_of_an_expert_is_cleared_up_and_the_old_one_comes_back(tmp_path):
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=("a", "a.b"), ranks=(4, 4))
    experts = pool.path / "experts"
    (experts / ".a.12345678.tmp").mkdir()
    (experts / ".a.b.12345678.tmp").mkdir()
    (experts / "a").rename(experts / ".a.77.old")
    with hold_all(pool.path, ["a"]):
        assert {path.name for path in experts.iterdir()} == {"a", "a.b", ".a.lock", ".a.b.12345678.tmp"}
    clear_up(experts, ["a.b"])
    assert verify(ExpertPool.open(pool.path)) == []


# Full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few hundred kilobytes."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({done.stderr.strip()}); run as root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("what", ["run_dir", "pool"])
def test_a_full_disk_ends_the_job_with_a_sentence_and_leaves_whole_files(what, folder, base, whole, small_disk):
    changes = {what: small_disk / what}
    (small_disk / "ballast").write_bytes(b"0" * (350_000 if what == "run_dir" else 600_000))
    outcome = run("train-experts", folder, base, **changes)
    assert outcome.code == 2, outcome.err
    assert len(outcome.errors) == 1
    assert str(small_disk / what) in outcome.errors[0]
    assert "No space left on device" in outcome.errors[0]
    assert not list(small_disk.rglob("*.tmp"))
    (small_disk / "ballast").unlink()
    if what == "pool":
        assert verify(ExpertPool.open(small_disk / "pool")) == []
    outcome = run(
        "train-experts",
        folder,
        base,
        **{**changes, "run_dir": folder / "run3" if what == "run_dir" else folder / "run"},
    )
    assert outcome.code == 0, outcome.err
    pool = small_disk / "pool" if what == "pool" else folder / "pool"
    assert largest_difference(only(whole, "lora"), adapters(pool)) == 0.0


# Damage and change --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["train-experts", "train-gates"])
def test_a_damaged_checkpoint_costs_steps_and_changes_nothing(stage, folder, base, whole, monkeypatch):
    # A disk that is slower than the steps would leave saves out.
    monkeypatch.setattr(Background, "busy", property(Background.wait))
    gates = stage == "train-gates"
    if gates:
        assert run("train-experts", folder, base).code == 0
    broken_off(stage, folder, base, 3 if gates else 20)
    kind = "gate" if gates else "expert"
    files = sorted((folder / "run" / "checkpoints" / kind / "copy").glob("step-*"))
    assert len(files) == 2
    content = bytearray(files[-1].read_bytes())
    content[len(content) // 2] ^= 1
    files[-1].write_bytes(bytes(content))
    outcome = run(stage, folder, base)
    assert outcome.code == 0, outcome.err
    assert f"{files[-1]} has changed since it was written" in outcome.err
    assert largest_difference(whole if gates else only(whole, "lora"), adapters(folder / "pool")) == 0.0


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("tasks/copy/train.jsonl", "tasks/copy/train.jsonl in tasks.path changed since the checkpoint of 'copy'"),
        ("tasks/copy/validation.jsonl", "tasks/copy/validation.jsonl in tasks.path changed since"),
        ("tasks.json", "the definition or the wordings of its task changed since the checkpoint of 'copy'"),
    ],
)
def test_a_task_file_that_changed_since_the_checkpoint_is_named(file, said, folder, base, whole):
    broken_off("train-experts", folder, base, 4)
    path = folder / "tasks" / file
    before = path.read_text()
    path.write_text(
        before.replace("Repeat the words", "Say the words")
        if file == "tasks.json"
        else before.replace("sun", "moon")
    )
    assert path.read_text() != before
    outcome = run("train-experts", folder, base)
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert said in outcome.errors[0]
    assert f"delete {folder / 'run/checkpoints/expert/copy'} to start it anew" in outcome.errors[0]
    path.write_text(before)
    assert run("train-experts", folder, base).code == 0
    assert largest_difference(only(whole, "lora"), adapters(folder / "pool")) == 0.0


def test_a_setting_that_changed_since_the_checkpoint_is_named_with_both_values(folder, base):
    broken_off("train-experts", folder, base, 4)
    outcome = run("train-experts", folder, base, train__max_steps=50)
    assert outcome.code == 2
    assert "steps of its recipe changed from 40 to 50 since the checkpoint of" in outcome.errors[0]


def test_an_expert_that_is_replaced_while_its_gate_is_in_training_is_named(folder, base, whole):
    assert run("train-experts", folder, base).code == 0
    pool = ExpertPool.open(folder / "pool")

    def replace() -> None:
        pool.expert("last").update_card(files={"adapter_model.safetensors": "0"})

    with work.at_turn(2, replace):
        outcome = run("train-gates", folder, base)
    assert outcome.code == 2
    assert "expert 'last' of pool" in outcome.errors[0]
    assert "was changed while its gate was in training" in outcome.errors[0]
    assert not pool.expert("last").has_gate


def test_an_expert_that_somebody_adds_meanwhile_stays_as_it_is(folder, base, tmp_path):
    def add() -> None:
        pool = ExpertPool.open(folder / "pool")
        source = random_pool(tmp_path / "source", tiny_causal(), experts=("copy",), ranks=(4,))
        pool.add("copy", source.expert("copy").folder)

    with work.at_turn(2, add):
        outcome = run("train-experts", folder, base)
    assert outcome.code == 2
    assert "expert 'copy' was added to pool" in outcome.errors[0]
    assert verify(ExpertPool.open(folder / "pool")) == []


def test_a_pool_that_changes_under_an_evaluation_is_told(folder, base, monkeypatch):
    pool = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN)
    describe_and_index(pool)
    once = evaluate.evaluate_router

    def changing(*args: Any) -> Any:
        found = once(*args)
        pool.expert("copy").update_card(files={"adapter_model.safetensors": "0"})
        return found

    monkeypatch.setattr(evaluate, "evaluate_router", changing)
    outcome = run("evaluate", folder, base, evaluate__routers="[base]")
    assert outcome.code == 2
    assert "was changed while it was evaluated" in outcome.errors[0]
    assert not list((folder / "run" / "rows").glob("*.json"))


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "gate.safetensors", "card.json", "adapter_config.json"]
)
def test_a_file_of_an_expert_that_is_a_link_out_of_the_pool_is_refused(file, tmp_path):
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=("a",), ranks=(4,))
    path = pool.path / "experts" / "a" / file
    path.rename(tmp_path / file)
    path.symlink_to(tmp_path / file)
    expert = ExpertPool.open(pool.path).expert("a")
    read = {
        "adapter_model.safetensors": expert.weights,
        "gate.safetensors": expert.gate,
        "card.json": expert.card,
        "adapter_config.json": expert.config,
    }[file]
    with pytest.raises(GliderError, match="is a link that leaves the pool"):
        read()


# Two writers --------------------------------------------------------------------------------------------------
