"""What the batch script of a stage does when its ranks have ended, with stubs in the place of Slurm's commands."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[1] / "slurm"
_STUBS = {
    "sleep": "exit 0",
    # Ranks leave their exit files and the step its code; a line for each node runs on the one that there is.
    "srun": """
        case "$*" in *--overlap*) SLURMD_NODENAME=n1 exec bash -c "${@: -1}" ;; esac
        for item in $RANKS; do echo "${item#*:}" > "$ATTEMPT/exit-${item%:*}"; done
        exit "$STEP"
    """,
    # The first SQUEUE_FAILS or SCONTROL_FAILS calls fail.
    "squeue": """
        echo >> "$CALLS/squeue"
        [ "$(wc -l < "$CALLS/squeue")" -gt "$SQUEUE_FAILS" ] || exit 1
        echo "$STATE"
    """,
    "scontrol": """
        [ "$1" = requeue ] || { echo n1; exit 0; }
        echo "$2" >> "$CALLS/requeue"
        [ "$(wc -l < "$CALLS/requeue")" -gt "$SCONTROL_FAILS" ] || exit 1
        echo "$2" > "$CALLS/queued"
    """,
}


@dataclass(frozen=True)
class Ended:
    """How the script ended: exit code, last line printed, and whether the job is queued again."""

    code: int
    last: str
    queued: bool


def ended(folder: Path, step: int, ranks: str = "", **changes: object) -> Ended:
    """The script of a job of two ranks whose step ends with ``step``; ``ranks`` are their codes: "0:85 1:0"."""
    stubs, calls = folder / "stubs", folder / "calls"
    for made in (stubs, calls):
        made.mkdir()
    for name, text in _STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}")
        (stubs / name).chmod(0o755)
    (folder / "site.env").write_text((SLURM / "site.env").read_text() + "FILE_SECONDS=0\n")
    values = {
        "SLURM_JOB_ID": 77, "SLURM_JOB_NUM_NODES": 1, "SLURM_NTASKS": 2, "SLURM_JOB_NODELIST": "n1",
        "GLIDER_SCRIPTS": SLURM, "GLIDER_SITE": folder / "site.env", "PATH": f"{stubs}:{os.environ['PATH']}",
        "ATTEMPT": folder / "run/slurm/77/attempt-0", "CALLS": calls, "STEP": step, "RANKS": ranks,
        "STATE": "RUNNING", "SQUEUE_FAILS": 0, "SCONTROL_FAILS": 0, **changes,
    }  # fmt: skip
    command = ["bash", str(SLURM / "stage.sbatch"), "evaluate", f"run_dir={folder / 'run'}"]
    env = {**os.environ, **{key: str(value) for key, value in values.items()}}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    return Ended(done.returncode, (done.stdout.splitlines() or [""])[-1], (calls / "queued").exists())


@pytest.mark.parametrize(
    "failing", [{"SQUEUE_FAILS": 2}, {"SQUEUE_FAILS": 1000}, {"SCONTROL_FAILS": 1}, {"SCONTROL_FAILS": 5}]
)
def test_a_job_is_queued_again_though_slurm_fails_to_answer_at_first(
    tmp_path: Path, failing: dict[str, int]
) -> None:
    assert ended(tmp_path, 0, "0:85 1:85", **failing).queued


@pytest.mark.parametrize("fails", [0, 2])
def test_a_cancelled_job_is_not_queued_again_and_says_so(tmp_path: Path, fails: int) -> None:
    end = ended(tmp_path, 0, "0:85 1:85", STATE="COMPLETING", SQUEUE_FAILS=fails)
    assert (end.code, end.queued) == (85, False)
    assert "Slurm has it as COMPLETING" in end.last


def test_a_job_that_cannot_be_queued_again_says_so(tmp_path: Path) -> None:
    end = ended(tmp_path, 0, "0:85 1:85", SCONTROL_FAILS=1000)
    assert (end.code, end.queued) == (85, False)
    assert "scontrol has not queued it again" in end.last


@pytest.mark.parametrize("step", [138, 140, 143])
@pytest.mark.parametrize("ranks", ["", "0:85", "0:0"])
def test_ranks_that_a_signal_ends_while_they_load_are_queued_again(tmp_path: Path, step: int, ranks: str) -> None:
    assert ended(tmp_path, step, ranks).queued


@pytest.mark.parametrize(("step", "ranks"), [(143, "0:1"), (143, "0:2"), (137, ""), (1, ""), (0, "0:0")])
def test_a_crash_or_a_mistake_is_not_queued_again(tmp_path: Path, step: int, ranks: str) -> None:
    end = ended(tmp_path, step, ranks)
    assert (end.code, end.queued) == (2 if ranks == "0:2" else step or 1, False)
