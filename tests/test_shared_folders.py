"""Several users, jobs and processes around one pool and one run directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_jobs import Outcome, command, cores, finish, kill, settings, snapshot, start, write_tasks

from glider_dist.errors import GliderError
from glider_dist.pool import ExpertPool, files
from glider_dist.pool.lock import hold_all
from glider_dist.pool.verify import verify
from glider_dist.semantics.index import save_index
from glider_dist.semantics.indexing import build_index
from glider_dist.testing import random_pool, tiny_causal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tasks(tmp_path / "tasks")
    return tmp_path


def run(stage: str, folder: Path, base: Path, **changes: Any) -> Outcome:
    with cores(1):
        return command(stage, *settings(folder, **{"base": base, **changes}))


class Fixed:
    """Embeds every text alike."""

    name = "fixed"

    def embed(self, texts: Any) -> torch.Tensor:
        return torch.ones(len(texts), 4) / 2

    def fingerprint(self) -> str:
        return "fixed"


@pytest.mark.parametrize(
    ("around", "umask", "file", "directory"),
    [(0o755, 0o022, 0o644, 0o755), (0o755, 0o002, 0o664, 0o775), (0o2770, 0o007, 0o660, 0o2770)],
)
def test_others_may_read_and_a_group_may_write_what_the_umask_and_the_folder_around_the_pool_let_them(
    around: int, umask: int, file: int, directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_UMASK", umask)
    tmp_path.chmod(around)
    before = os.umask(umask)
    try:
        pool = random_pool(tmp_path / "pool", tiny_causal(), 2)
        for expert in pool.experts():
            expert.update_card(descriptions=["Does something."])
        index = build_index({name: ["Does something."] for name in pool.names}, Fixed())[0]
        save_index(index, pool.router_dir / "embeddings.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / "pool").rglob("*"):
        assert path.stat().st_mode & 0o7777 == (directory if path.is_dir() else file), path


def test_two_jobs_that_train_the_same_expert_into_one_pool_are_told_and_the_lock_dies_with_its_process(
    folder: Path, base: Path
) -> None:
    assert run("train-experts", folder, base, tasks__held_in="[copy]", tasks__held_out="[first]").code == 0
    holder = (
        "import sys, time; from pathlib import Path; from glider_dist.pool.lock import hold_all\n"
        "with hold_all(Path(sys.argv[1]), ['upper']):\n    print('held', flush=True); time.sleep(600)"
    )
    process = start([sys.executable, "-c", holder, str(folder / "pool")], folder)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        outcome = run("train-experts", folder, base)
        assert outcome.code == 2
        assert outcome.errors[0].startswith(
            f"expert 'upper' of pool {folder / 'pool'} is being written by another job"
        )
        assert f"process {process.pid} on" in outcome.errors[0]
        # Another expert is nobody's business.
        words: dict[str, Any] = {"tasks__held_in": "[copy,last]", "tasks__held_out": "[first]"}
        assert run("train-experts", folder, base, **words).code == 0
    finally:
        kill(process)
        finish(process)
    assert run("train-experts", folder, base).code == 0
    assert not list((folder / "pool" / "experts").glob(".*"))


def test_of_many_processes_one_holds_a_lock_and_all_or_none_of_several(tmp_path):
    (tmp_path / "experts").mkdir()
    with hold_all(tmp_path, ["b"]):
        with pytest.raises(GliderError, match="'b'"):
            hold_all(tmp_path, ["a", "b"])
        with hold_all(tmp_path, ["a"]):
            pass
    with contextlib.closing(hold_all(tmp_path, ["a", "b"])), pytest.raises(GliderError):
        hold_all(tmp_path, ["a"])


def test_an_expert_that_is_named_twice_is_held_once(tmp_path):
    (tmp_path / "experts").mkdir()
    with hold_all(tmp_path, ["a", "a"]):
        assert (tmp_path / "experts" / ".a.lock").exists()
    assert list((tmp_path / "experts").iterdir()) == []


def test_a_run_directory_that_another_job_writes_is_not_touched(folder, base):
    run_dir = folder / "run"
    run_dir.mkdir()
    job = (
        "import sys, time; from pathlib import Path; from glider_dist.tracking.state import RunState\n"
        "state = RunState(Path(sys.argv[1]), 'evaluate'); print('held', flush=True); time.sleep(600)"
    )
    process = start([sys.executable, "-c", job, str(run_dir)], folder)
    try:
        assert process.stdout.readline().strip() == "held"
        before = snapshot(folder)
        outcome = run("train-experts", folder, base)
        assert outcome.code == 2
        assert f"run_dir {run_dir} is being written by another job (process {process.pid}" in outcome.errors[0]
        assert snapshot(folder) == before
    finally:
        kill(process)
        finish(process)
    assert run("train-experts", folder, base).code == 0
    assert not (run_dir / ".running").exists()


def test_a_gate_that_its_card_does_not_know_is_trained_anew(folder, base):
    assert run("train-experts", folder, base).code == 0
    pool = ExpertPool.open(folder / "pool")
    killed = pool.expert("last").folder / "gate.safetensors"
    save_file({"nothing": torch.zeros(1)}, killed)  # killed before the card was written
    outcome = run("train-gates", folder, base)
    assert outcome.code == 0
    assert "3 of 3 gates to train" in outcome.err
    assert not list(verify(pool))


def test_a_half_deleted_expert_is_named_before_anything_is_trained(folder, base):
    assert run("train-experts", folder, base).code == 0
    weights = folder / "pool" / "experts" / "upper" / "adapter_model.safetensors"
    weights.unlink()
    outcome = run("train-experts", folder, base)
    assert outcome.code == 2
    assert outcome.errors == [
        f"{weights.parent} is there, but holds no adapter_model.safetensors: restore it, or delete the folder to "
        "train anew"
    ]
    shutil.rmtree(weights.parent)
    assert run("train-experts", folder, base).code == 0
