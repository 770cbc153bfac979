"""What submit.sh tells Slurm, with stubs in the place of its commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from glider_dist.planning.slurm_chain import Link
from glider_dist.planning.slurm_script import chain_script

_CHAIN = [Link("train-experts", 1, 1, (0, 1)), Link("describe", 1, 1, after="train-experts")]
_STUBS = {
    # The ids are 1, 2, ..; REFUSED is a stage that is not taken.
    "sbatch": 'case "$*" in *$REFUSED.sbatch*) exit 1 ;; esac; echo "$*" >> calls; wc -l < calls',
    # RUNNING has a line for each member of an array.
    "squeue": '[ "$RUNNING" != away ] || exit 1; echo "$*" > asked; printf "%b" "$RUNNING"',
    "scancel": 'echo "$*" > cancelled',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    for name, text in _STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "submit.sh").write_text(chain_script(_CHAIN, tmp_path, tmp_path))
    return tmp_path


def submit(folder: Path, running: str = "", refused: str = "none") -> list[str]:
    """Submit once more; what each job waits for, in order ("" for nothing)."""
    calls = folder / "calls"
    before = len(calls.read_text().splitlines()) if calls.exists() else 0
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "RUNNING": running, "REFUSED": refused}
    done = subprocess.run(["bash", folder / "submit.sh"], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (refused == "none"), done.stderr
    words = [line.split() for line in calls.read_text().splitlines()[before:]]
    return ["".join(word[13:] for word in line if word.startswith("--dependency=")) for line in words]


def test_a_first_submission_waits_for_nothing(folder: Path) -> None:
    assert submit(folder) == ["", "afterok:1"]
    assert not (folder / "asked").exists()


def test_submitting_again_waits_for_those_earlier_jobs_that_have_not_ended(folder: Path) -> None:
    submit(folder)
    assert submit(folder, "1\n1\n") == ["afterany:1", "afterok:3"]
    assert "-j 1,2 " in (folder / "asked").read_text()
    # Job 2 has ended; 1 is still waited for, though it is not of the last submission.
    assert submit(folder, "1\n1\n3\n4\n") == ["afterany:1:3:4", "afterok:5"]
    assert "-j 1,3,4 " in (folder / "asked").read_text()
    assert submit(folder) == ["", "afterok:7"]


def test_submitting_again_waits_for_nothing_if_slurm_cannot_tell_and_asks_again_later(folder: Path) -> None:
    submit(folder)
    assert submit(folder, "away") == ["", "afterok:3"]
    assert submit(folder, "2\n3\n") == ["afterany:2:3", "afterok:5"]


def test_a_refused_submission_forgets_no_earlier_job(folder: Path) -> None:
    submit(folder)
    submit(folder, "1\n", refused="describe")
    assert (folder / "cancelled").read_text() == "3\n"
    assert submit(folder, "1\n") == ["afterany:1", "afterok:4"]
