"""What submit.sh tells Slurm, with stubs in the place of its commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from glider_dist.planning.slurm_chain import Link
from glider_dist.planning.slurm_script import MAY_STAY, chain_script

_CHAIN = [Link("train-experts", 1, 1, (0, 1)), Link("describe", 1, 1, after="train-experts")]
_STUBS = {
    # The ids are 1, 2, ..; REFUSED is a stage that is not taken. BEFORE and AFTER are printed around the id.
    "sbatch": """
        case "$*" in *$REFUSED.sbatch*) exit 1 ;; esac
        env | grep -E '^(SLURM|SQUEUE|SBATCH|SRUN)_' | sort > environment
        echo "$*" >> calls; printf "%b%s%b\\n" "$BEFORE" "$(wc -l < calls)" "$AFTER"
    """,
    # RUNNING has a line for each member of an array; the first AWAY calls fail and say SAYS.
    "squeue": """
        echo "$*" >> asked
        [ "$(wc -l < asked)" -gt "$AWAY" ] || { echo "slurm_load_jobs error: $SAYS" >&2; exit 1; }
        printf "%b" "$RUNNING"
    """,
    "scancel": 'echo "$*" >> cancelled; exit "$CANCEL"',
    "sleep": "exit 0",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    for name, text in _STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "submit.sh").write_text(chain_script(_CHAIN, tmp_path, tmp_path))
    return tmp_path


def submitted(folder: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    """Submit once more, with what the stubs read in ``changes``."""
    (folder / "asked").unlink(missing_ok=True)
    values = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "REFUSED": "none", "BEFORE": "", "AFTER": "",
        "RUNNING": "", "AWAY": 0, "SAYS": "Unable to contact slurm controller", "CANCEL": 0, **changes,
    }  # fmt: skip
    env = {**os.environ, **{key: str(value) for key, value in values.items()}}
    return subprocess.run(["bash", folder / "submit.sh"], env=env, capture_output=True, text=True, check=False)


def submit(folder: Path, running: str = "", **changes: object) -> list[str]:
    """Submit once more; what each job waits for, in order ("" for nothing)."""
    calls = folder / "calls"
    before = len(calls.read_text().splitlines()) if calls.exists() else 0
    done = submitted(folder, RUNNING=running, **changes)
    assert (done.returncode == 0) == ("REFUSED" not in changes), done.stderr
    words = [line.split() for line in calls.read_text().splitlines()[before:]]
    return ["".join(word[13:] for word in line if word.startswith("--dependency=")) for line in words]


def test_a_first_submission_waits_for_nothing(folder: Path) -> None:
    assert submit(folder) == ["", "afterok:1"]
    assert not (folder / "asked").exists()


def test_submitting_again_waits_for_those_earlier_jobs_that_have_not_ended(folder: Path) -> None:
    submit(folder)
    assert submit(folder, "1 None\n1 None\n") == ["afterany:1", "afterok:3"]
    assert "-j 1,2 " in (folder / "asked").read_text()
    # Job 2 has ended; 1 is still waited for, though it is not of the last submission.
    assert submit(folder, "1 None\n1 None\n3 Priority\n4 Dependency\n") == ["afterany:1:3:4", "afterok:5"]
    assert "-j 1,3,4 " in (folder / "asked").read_text()
    assert submit(folder) == ["", "afterok:7"]


def test_a_refused_submission_forgets_no_earlier_job(folder: Path) -> None:
    submit(folder)
    submit(folder, "1 None\n", REFUSED="describe")
    assert (folder / "cancelled").read_text() == "3\n"
    assert submit(folder, "1 None\n") == ["afterany:1", "afterok:4"]


def test_jobs_are_waited_for_in_whatever_state_squeue_lists_them(folder: Path) -> None:
    submit(folder)
    submit(folder, "1 None\n")
    # A list of states would leave out those that have a flag, such as REQUEUED.
    assert " -t " not in (folder / "asked").read_text()


def test_a_held_job_is_named_as_such_where_it_is_waited_for(folder: Path) -> None:
    submit(folder)
    running = "1 launch failed requeued held\n2 Dependency\n"
    assert submitted(folder, RUNNING=running).stderr == (
        "waits for the earlier jobs 1 (held: launch failed requeued held), 2\n"
    )
    running = "1 JobHeldUser\n3 JobHeldAdmin\n"
    assert "1 (held: JobHeldUser), 3 (held: JobHeldAdmin)\n" in submitted(folder, RUNNING=running).stderr


def test_a_slurm_that_answers_at_the_third_time_is_heard(folder: Path) -> None:
    submit(folder)
    assert submit(folder, "2 None\n", AWAY=2) == ["afterany:2", "afterok:3"]


def test_nothing_is_submitted_while_slurm_does_not_tell_of_the_earlier_jobs(folder: Path) -> None:
    submit(folder)
    kept = (folder / "jobs").read_text()
    done = submitted(folder, RUNNING="2 None\n", AWAY=1000)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        "squeue does not tell whether the earlier jobs 1,2 have ended (slurm_load_jobs error: Una" in done.stderr
    )
    assert len((folder / "calls").read_text().splitlines()) == 2
    assert (folder / "jobs").read_text() == kept


def test_a_job_that_slurm_has_forgotten_has_ended(folder: Path) -> None:
    submit(folder)
    assert submit(folder, AWAY=1000, SAYS="Invalid job id specified") == ["", "afterok:3"]


def test_jobs_of_another_cluster_are_asked_for_and_cancelled_there(folder: Path) -> None:
    assert submit(folder, AFTER=";far") == ["", "afterok:1"]
    # Slurm names the cluster first.
    assert submit(folder, "CLUSTER: far\n2 None\n") == ["afterany:2", "afterok:3"]
    assert "--clusters=far -j 1,2 " in (folder / "asked").read_text()
    submit(folder, "2 None\n3 None\n", AFTER=";near", REFUSED="describe")
    asked = (folder / "asked").read_text().splitlines()
    assert [line.split(" -o")[0] for line in asked] == ["-h -j 3,4", "-h --clusters=far -j 2"]
    assert (folder / "cancelled").read_text() == "--clusters=near 5\n"
    assert (folder / "jobs").read_text().split() == ["3", "2;far", "5;near"]


def test_the_id_is_the_last_line_that_sbatch_prints(folder: Path) -> None:
    assert submit(folder, BEFORE="Budget: 100 hours\\n\\n") == ["", "afterok:1"]
    assert (folder / "jobs").read_text() == "1\n2\n"


def test_an_sbatch_that_does_not_tell_the_id_stops_the_submission(folder: Path) -> None:
    done = submitted(folder, BEFORE="Submitted batch job ")
    assert done.returncode == MAY_STAY
    assert "the last line of sbatch must be the id" in done.stderr
    assert "these jobs may stay submitted, cancel them: that of train-experts\n" in done.stderr


def test_jobs_that_cannot_be_cancelled_are_named(folder: Path) -> None:
    done = submitted(folder, REFUSED="describe", CANCEL=1)
    assert done.returncode == MAY_STAY
    assert "these jobs may stay submitted, cancel them: 1\n" in done.stderr
    assert submitted(folder, REFUSED="describe").returncode == 1


def test_variables_of_a_job_in_which_one_submits_do_not_reach_its_jobs(folder: Path) -> None:
    kept = {"SLURM_CONF": "/x", "SLURM_CLUSTERS": "far", "SBATCH_ACCOUNT": "lab", "SRUN_CPUS_PER_TASK": "2"}
    of_job = {"SLURM_MEM_PER_CPU": 1, "SLURM_CPU_BIND": "none", "SLURM_RESTART_COUNT": 3, "SQUEUE_STATES": "F"}
    assert submitted(folder, **kept, **of_job).returncode == 0
    names = {line.split("=")[0] for line in (folder / "environment").read_text().splitlines()}
    assert kept.keys() <= names
    assert not of_job.keys() & names
