"""What the batch script of a stage does when its ranks have ended, with stubs in the place of Slurm's commands."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[1] / "slurm"
_STUBS = {
    # LATE is a file of a rank that is seen later than the step's end.
    "sleep": """[ -z "$LATE" ] || echo "${LATE#*:}" > "$ATTEMPT/exit-${LATE%:*}" """,
    # Ranks leave their exit files and the step its code; a line for each node runs on the one that there is.
    "srun": """
        case "$*" in *--overlap*) SLURMD_NODENAME=n1 exec bash -c "${@: -1}" ;; esac
        for item in $RANKS; do echo "${item#*:}" > "$ATTEMPT/exit-${item%:*}"; done
        exit "$STEP"
    """,
    # The first STATE_FAILS or SCONTROL_FAILS calls fail. SQUEUE_STATES filters, as in the real one.
    "squeue": """
        [ -z "$SQUEUE_STATES" ] || exit 0
        case "$*" in *%x*) echo "$WITHOUT"; exit ;; esac
        echo >> "$CALLS/squeue"
        [ "$(wc -l < "$CALLS/squeue")" -gt "$STATE_FAILS" ] || exit 1
        [ -z "$SLURM_CLUSTERS" ] || echo "CLUSTER: $SLURM_CLUSTERS"
        echo "$STATE"
    """,
    "scontrol": """
        [ "$1" != update ] || echo "$*" >> "$CALLS/updates"
        [ "$1" = requeue ] || { echo "${3//,/$'\\n'}"; exit 0; }
        echo "$2" >> "$CALLS/requeue"
        [ "$(wc -l < "$CALLS/requeue")" -gt "$SCONTROL_FAILS" ] || exit 1
        echo "$2" > "$CALLS/queued"
    """,
}


@dataclass(frozen=True)
class Ended:
    """How the script ended: exit code, last line printed, whether the job is queued again, and nodes left out."""

    code: int
    last: str
    queued: bool
    excluded: list[str]


def prepared(folder: Path, step: int, ranks: str = "", **changes: object) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the script; arguments as for :func:`ended`."""
    site = "FILE_SECONDS=1\nSTOP_SECONDS=3\nsite_check() { $CHECK; }\n"
    stubs, calls = folder / "stubs", folder / "calls"
    for made in (stubs, calls):
        made.mkdir()
    for name, text in _STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}")
        (stubs / name).chmod(0o755)
    (folder / "site.env").write_text((SLURM / "site.env").read_text() + site)
    values = {
        "SLURM_JOB_ID": 77, "SLURM_JOB_NUM_NODES": 1, "SLURM_NTASKS": 2, "SLURM_JOB_NODELIST": "n1",
        "GLIDER_SCRIPTS": SLURM, "GLIDER_SITE": folder / "site.env", "PATH": f"{stubs}:{os.environ['PATH']}",
        "ATTEMPT": folder / "run/slurm/77/attempt-0", "CALLS": calls, "STEP": step, "RANKS": ranks,
        "STATE": "RUNNING", "STATE_FAILS": 0, "SCONTROL_FAILS": 0, "CHECK": "true", "LATE": "", "WITHOUT": "",
        **changes,
    }  # fmt: skip
    command = ["bash", str(SLURM / "stage.sbatch"), "evaluate", f"run_dir={folder / 'run'}"]
    return command, {**os.environ, **{key: str(value) for key, value in values.items()}}


def ended(folder: Path, step: int, ranks: str = "", **changes: object) -> Ended:
    """The script of a job of two ranks whose step ends with ``step``; ``ranks`` are their codes: "0:85 1:0"."""
    command, env = prepared(folder, step, ranks, **changes)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    left_out = folder / "run/slurm/77/excluded"
    excluded = left_out.read_text().split() if left_out.exists() else []
    last = (done.stdout.splitlines() or [""])[-1]
    return Ended(done.returncode, last, (folder / "calls/queued").exists(), excluded)


@pytest.mark.parametrize(
    "failing", [{"STATE_FAILS": 2}, {"STATE_FAILS": 1000}, {"SCONTROL_FAILS": 1}, {"SCONTROL_FAILS": 5}]
)
def test_a_job_is_queued_again_though_slurm_fails_to_answer_at_first(
    tmp_path: Path, failing: dict[str, int]
) -> None:
    assert ended(tmp_path, 0, "0:85 1:85", **failing).queued


@pytest.mark.parametrize("fails", [0, 2])
def test_a_cancelled_job_is_not_queued_again_and_says_so(tmp_path: Path, fails: int) -> None:
    end = ended(tmp_path, 0, "0:85 1:85", STATE="COMPLETING", STATE_FAILS=fails)
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


@pytest.mark.parametrize("step", [1, 2, 137, 139])
def test_a_killed_rank_is_a_crash_though_another_has_left_to_go_on_later(tmp_path: Path, step: int) -> None:
    # srun tells the others to end, and one that has just started leaves with 85.
    end = ended(tmp_path, step, "0:85")
    assert (end.code, end.queued) == (1 if step == 2 else step, False)


def test_a_program_that_srun_does_not_find_is_no_mistake_and_has_its_node_looked_at(tmp_path: Path) -> None:
    end = ended(tmp_path, 2, CHECK="false")
    assert (end.queued, end.excluded) == (True, ["n1"])


def test_a_mistake_that_is_seen_late_is_a_mistake(tmp_path: Path) -> None:
    assert ended(tmp_path, 2, LATE="1:2").code == 2


@pytest.mark.parametrize(("step", "ranks"), [(143, "0:1"), (143, "0:2"), (137, ""), (1, ""), (0, "0:0")])
def test_a_crash_or_a_mistake_is_not_queued_again(tmp_path: Path, step: int, ranks: str) -> None:
    end = ended(tmp_path, step, ranks)
    assert (end.code, end.queued) == (2 if ranks == "0:2" else step or 1, False)


def test_a_rank_that_cannot_tell_of_its_crash_while_python_loads_has_its_node_left_out(tmp_path: Path) -> None:
    # Rank 1's node has no Python; the other rank is ended while it loads, and 143 is the higher code.
    end = ended(tmp_path, 143, CHECK="false")
    assert (end.queued, end.excluded) == (True, ["n1"])


def test_a_fetch_that_crashes_ends_whatever_its_node_is_for(tmp_path: Path) -> None:
    command, env = prepared(tmp_path, 1, "0:1", CHECK="false", SLURM_NTASKS=1)
    command[command.index("evaluate")] = "fetch"
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, (tmp_path / "calls/queued").exists()) == (1, False)
    assert not (tmp_path / "run/slurm/77/excluded").exists()


def test_nodes_that_a_job_was_submitted_without_stay_left_out(tmp_path: Path) -> None:
    assert ended(tmp_path, 137, CHECK="false", WITHOUT="n7,n8").excluded == ["n7", "n8", "n1"]
    assert (tmp_path / "calls/updates").read_text() == "update JobId=77 ExcNodeList=n7,n8,n1\n"


@pytest.mark.parametrize("ranks", ["", "0:85"])
def test_a_crash_that_is_seen_later_than_the_end_of_the_other_ranks_is_a_crash(tmp_path: Path, ranks: str) -> None:
    end = ended(tmp_path, 143, ranks, LATE="1:1")
    assert (end.code, end.queued) == (1 if ranks else 143, False)


def test_nodes_of_a_cancelled_job_are_not_taken_for_bad(tmp_path: Path) -> None:
    end = ended(tmp_path, 143, CHECK="false", STATE="COMPLETING")
    assert (end.code, end.queued, end.excluded) == (85, False, [])


@pytest.mark.parametrize("state", ["SIGNALING", "RESIZING", "STOPPED"])
def test_a_job_that_runs_under_another_name_of_its_state_is_queued_again(tmp_path: Path, state: str) -> None:
    assert ended(tmp_path, 0, "0:85 1:85", STATE=state).queued


def test_a_job_asks_the_cluster_it_runs_on_whatever_the_submitting_shell_named(tmp_path: Path) -> None:
    # For a named one squeue prints a heading, which is no state.
    assert ended(tmp_path, 0, "0:85 1:85", SLURM_CLUSTERS="near,far").queued


def rank_ended(folder: Path, **modules: str) -> int:
    """The exit code of rank 1 with these modules as glider_dist; its files go to ``folder``."""
    (folder / "glider_dist").mkdir()
    for name, text in {"__init__": "", **modules}.items():
        (folder / f"glider_dist/{name}.py").write_text(text)
    env = {**os.environ, "PYTHONPATH": str(folder), "SLURM_PROCID": "1", "SLURMD_NODENAME": "n1"}
    command = [sys.executable, str(SLURM / "rank.py"), str(folder), "evaluate"]
    return subprocess.run(command, env=env, capture_output=True, check=False).returncode


def test_a_rank_whose_package_cannot_be_imported_says_that_it_crashed(tmp_path: Path) -> None:
    assert rank_ended(tmp_path, __init__="raise OSError('no such device')\n") == 1
    assert (tmp_path / "exit-1").read_text() == "1\n"


def test_a_cancelled_job_stays_ended_whatever_the_submitting_shell_filters_by(tmp_path: Path) -> None:
    end = ended(tmp_path, 0, "0:85 1:85", STATE="COMPLETING", SQUEUE_STATES="PENDING,RUNNING")
    assert (end.code, end.queued) == (85, False)


def test_the_first_of_very_many_nodes_is_found(tmp_path: Path) -> None:
    command, env = prepared(tmp_path, 0, "0:0 1:0", GLIDER_LAUNCHER="deepspeed", SLURM_NTASKS_PER_NODE=1)
    stubs = tmp_path / "stubs"
    (stubs / "scontrol").write_text("#!/bin/bash\nseq -f n%g 20000\n")
    (stubs / "python3").write_text(f'#!/bin/bash\necho "$*" > {tmp_path}/started\n{_STUBS["srun"]}')
    (stubs / "python3").chmod(0o755)
    assert subprocess.run(command, env=env, check=False, timeout=60).returncode == 0
    assert "--master_addr n1 " in (tmp_path / "started").read_text()
    hosts = (tmp_path / "run/slurm/77/attempt-0/hosts").read_text().splitlines()
    assert (hosts[0], hosts[-1], len(hosts)) == ("n1 slots=1", "n20000 slots=1", 20_000)


def test_a_rank_that_fills_the_disk_leaves_no_empty_word_of_how_it_ended(tmp_path: Path) -> None:
    fills = """
import resource
def main(words):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return 85
"""
    assert rank_ended(tmp_path, cli=fills) == 1
    assert not list(tmp_path.glob("exit-*"))


def test_a_job_whose_time_is_over_while_its_service_starts_is_queued_again_at_once(tmp_path: Path) -> None:
    command, env = prepared(tmp_path, 0, GLIDER_SERVICE="yes")
    (tmp_path / "stubs/srun").write_text("#!/bin/bash\nkill -USR1 $PPID; exec /bin/sleep 20\n")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert "did not start" not in done.stdout
    assert (done.returncode, (tmp_path / "calls/queued").exists()) == (85, True)


@pytest.mark.parametrize(("service", "code"), [("yes", 0), ("must", 1)])
def test_ranks_embed_for_themselves_where_the_service_cannot_start_unless_it_must(
    service: str, code: int, tmp_path: Path
) -> None:
    command, env = prepared(tmp_path, 0, "0:0 1:0", GLIDER_SERVICE=service)
    stub = tmp_path / "stubs/srun"
    missing = 'case "$*" in *serve-embeddings*) echo "uvicorn is missing"; exit 2 ;; esac'
    stub.write_text(f"#!/bin/bash\n{missing}\n{_STUBS['srun']}")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert "uvicorn is missing" in done.stdout
    assert "the embedding service did not start" in done.stdout
    assert done.returncode == code
    assert ("each rank embeds for itself" in done.stdout) == (service == "yes")
    assert len(list((tmp_path / "run/slurm/77/attempt-0").glob("exit-*"))) == (2 if code == 0 else 0)


def test_ranks_that_end_while_they_are_told_to_stop_have_ended_as_they_say(tmp_path: Path) -> None:
    # All was done, and rank 1's word comes late; the signal is not how the step ended.
    command, env = prepared(tmp_path, 0, "0:0", LATE="1:0")
    stub = tmp_path / "stubs/srun"
    stub.write_text(f"""#!/bin/bash
        case "$*" in *--overlap*) touch "$CALLS/told"; /bin/sleep 1; exit ;; esac
        /bin/sleep 1
        kill -USR1 "$PPID"
        until [ -e "$CALLS/told" ]; do /bin/sleep 0.05; done
        {_STUBS["srun"]}
    """)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert "asked to stop" in done.stdout
    assert (done.returncode, (tmp_path / "calls/queued").exists()) == (0, False)


def test_ranks_have_their_time_to_stop_from_the_notice_on_however_long_telling_them_takes(tmp_path: Path) -> None:
    command, env = prepared(tmp_path, 0)
    (tmp_path / "stubs/srun").write_text("""#!/bin/bash
        case "$*" in *--overlap*) /bin/sleep 4; touch "$CALLS/told"; exit ;; esac
        trap 'touch "$CALLS/ended"; exit 143' TERM
        touch "$CALLS/started"
        while :; do /bin/sleep 0.1; done
    """)
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 30
        while not (tmp_path / "calls/started").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        process.wait(120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    told, ranks = ((tmp_path / "calls" / name).stat().st_mtime for name in ("told", "ended"))
    assert ranks - told < 2, "STOP_SECONDS=3 were over when all had been told"
    assert (tmp_path / "calls/queued").exists()
