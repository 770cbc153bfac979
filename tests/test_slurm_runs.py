"""What ``glider-dist runs show`` says of runs of batch jobs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_jobs import command, settings, write_tasks
from test_slurm_stage import prepared

from glider_dist.testing import save_tiny_base, tiny_causal
from glider_dist.tracking.runs import read_run, show


def found(folder: Path, typed: list[str], submit: str = "", ranks: int = 2) -> str:
    """What is shown of a killed run."""
    versions = {"command": typed, "submit": submit, "launcher": "srun", "folder": "/some where"}
    (folder / "versions.json").write_text(json.dumps({**versions, "compute": {"ranks": ranks}}))
    return show(read_run(folder)).partition("to go on")[2]


def test_a_run_of_a_submitted_pipeline_goes_on_by_submitting_it_again(tmp_path: Path) -> None:
    typed = ["/r/slurm/rank.py", "/run/slurm/7/attempt-0", "evaluate", "pool=/pool", "run_dir=/run/evaluate"]
    submit = "glider-dist slurm submit config.yaml slurm.nodes=2"
    assert found(tmp_path, typed, submit) == f", unless its job is queued again:\n  cd '/some where' && {submit}"


@pytest.mark.parametrize("ranks", [1, 8])
def test_a_run_submitted_by_hand_goes_on_by_the_script_with_the_words_of_its_stage(
    tmp_path: Path, ranks: int
) -> None:
    typed = ["/my r/slurm/rank.py", "/run/slurm/7/attempt-0", "evaluate", "a=b c"]
    line = f"sbatch --ntasks={ranks} '/my r/slurm/stage.sbatch' evaluate 'a=b c'"
    assert found(tmp_path, typed, ranks=ranks).endswith(f":\n  cd '/some where' && {line}")


def test_a_batch_job_records_the_line_that_submits_it(tmp_path: Path) -> None:
    save_tiny_base(tmp_path / "base", tiny_causal())
    write_tasks(tmp_path / "tasks")
    words = [*settings(tmp_path, base=tmp_path / "base", run_dir=tmp_path / "it's"), "stages=[train-experts]"]
    (tmp_path / "mine.yaml").write_text("train:\n  max_steps: 2\n")
    assert command("slurm", "render", str(tmp_path / "mine.yaml"), *words).code == 0
    script = (tmp_path / "it's/slurm/train-experts.sbatch").read_text()
    # The stub of srun runs the first rank alone.
    _, env = prepared(tmp_path, 0, SLURM_NTASKS=1, SLURM_PROCID=0, SLURMD_NODENAME="n1")
    run = f'while [[ $1 == --* ]]; do shift; done; shift; exec {shlex.quote(sys.executable)} "$@"'
    (tmp_path / "stubs/srun").write_text(f"#!/bin/bash\n{run}\n")
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    line = read_run(tmp_path / "it's/train-experts").command
    assert "rank.py" not in line
    shown = re.sub(r"^cd \S+ && glider-dist ", "", line)
    shutil.rmtree(tmp_path / "pool")
    again = command(*shlex.split(shown), "--dry-run")
    assert again.code == 0, again.err
    assert script in again.out
