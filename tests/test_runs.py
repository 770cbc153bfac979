"""``glider-dist runs``: what it says of runs that are done, stopped, failed, killed and under way."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import rank_checkpoints as work
from small_jobs import command, cores, finish, kill, settings, start, write_tasks

from glider_dist.testing import save_tiny_base, tiny_causal
from glider_dist.tracking.runs import find_runs, read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of each kind in ``runs/``."""
    folder = tmp_path_factory.mktemp("runs")
    write_tasks(folder / "tasks")
    base = save_tiny_base(folder / "base", tiny_causal())

    def run(name: str, **changes: Any) -> Any:
        words = settings(folder, base=base, run_dir=folder / "runs" / name, **{"pool": folder / name, **changes})
        # What was typed is noted from here, and pytest may have been started without any words.
        with cores(1), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["glider-dist", "train-experts", *words])
            return command("train-experts", *words)

    assert run("done").code == 0
    assert run("stopped", max_minutes=1e-9).code == 85
    with work.at_turn(3, work.killed), pytest.raises(work.Killed):
        run("killed", train__save_steps=1)
    # The process lives on here, so its lock has to be given up for it.
    state = json.loads((folder / "runs" / "killed" / "state.json").read_text())
    assert state["state"] == "running"
    (folder / "runs" / "killed" / ".running").unlink()
    with cores(1):
        words = settings(folder, base=base, pool=folder / "done", run_dir=folder / "runs/evaluated")
        assert command("evaluate", *words, "evaluate.routers=[base,merged]").code == 0
    return folder


def test_the_table_has_a_line_for_each_run_with_state_progress_and_score(folder):
    outcome = command("runs", str(folder / "runs"))
    assert outcome.code == 0, outcome.err
    lines = {line.split()[0].rpartition("/")[2]: line for line in outcome.out.splitlines()[1:]}
    assert lines.keys() == {"done", "stopped", "killed", "evaluated"}
    for name, words in {
        "done": ("train-experts", " done ", "expert steps on rank 0 18/18", "expert/validation_loss/p50 "),
        "stopped": (" stopped ", "expert steps on rank 0 3/18", "expert/loss "),
        "killed": (" killed ", "3/18"),
        "evaluated": ("evaluate ", " done ", " rows 2/2 ", "held_out 0."),
    }.items():
        assert all(word in lines[name] for word in words), lines[name]


def test_show_gives_the_command_that_goes_on(folder, monkeypatch):
    outcome = command("runs", "show", str(folder / "runs" / "stopped"))
    assert outcome.code == 0, outcome.err
    assert "stopped (max_minutes=1e-09 have passed)" in outcome.out
    assert f"kept:     checkpoints of 3 in {folder / 'runs/stopped/checkpoints/expert'}" in outcome.out
    assert "to go on:\n  cd " in outcome.out
    assert "glider-dist train-experts " in outcome.out
    assert "to go on" not in command("runs", "show", str(folder / "runs" / "done")).out


@pytest.mark.parametrize(
    ("command", "launcher", "ranks", "wanted"),
    [
        (["x", "train-gates", "a=b c"], "", 1, "cd '/some where' && glider-dist train-gates 'a=b c'"),
        (["x", "--local_rank=0", "evaluate"], "deepspeed", 2,
         "cd '/some where' && deepspeed --num_gpus 2 --module glider_dist evaluate"),
        (["x", "evaluate"], "torchrun", 2,
         "cd '/some where' && torchrun --nproc_per_node 2 -m glider_dist evaluate"),
        (["x", "--local_rank=0", "evaluate"], "deepspeed", (256, 8),
         "cd '/some where' && deepspeed --hostfile HOSTS --num_gpus 8 --module glider_dist evaluate"),
        (["x", "evaluate"], "torchrun", (16, 8),
         "cd '/some where' && torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:PORT"
         " --nproc_per_node 8 -m glider_dist evaluate"),
        (["x", "evaluate"], "srun", (16, 8),
         "cd '/some where' && srun --ntasks=16 --ntasks-per-node=8 python -m glider_dist evaluate"),
        (["x", "evaluate"], "srun", 8, "cd '/some where' && srun --ntasks=8 python -m glider_dist evaluate"),
        (["x", "--local_rank=0", "quickstart", "q.yaml"], "deepspeed", 2,
         "cd '/some where' && glider-dist quickstart q.yaml --ranks 2"),
    ],
)  # fmt: skip
def test_the_command_is_the_one_of_its_launcher(command, launcher, ranks, wanted, tmp_path):
    compute = {"ranks": ranks} if isinstance(ranks, int) else {"ranks": ranks[0], "ranks_per_node": ranks[1]}
    versions = {"command": command, "launcher": launcher, "compute": compute, "folder": "/some where"}
    (tmp_path / "versions.json").write_text(json.dumps(versions))
    assert read_run(tmp_path).command == wanted


def test_the_score_is_the_best_routers_and_not_the_oracles(tmp_path):
    (tmp_path / "versions.json").write_text("{}")
    scores = {"evaluate/oracle/held_out": 0.9, "evaluate/glider/held_out": 0.4, "evaluate/base/held_out": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(scores) + "\n")
    assert read_run(tmp_path).score == "glider/held_out 0.400"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"evaluate/oracle/held_out": 0.9}) + "\n")
    assert read_run(tmp_path).score == "oracle/held_out 0.900"


@pytest.mark.jobs
def test_a_run_is_running_while_its_process_lives_and_killed_afterwards(tmp_path):
    write_tasks(tmp_path / "tasks")
    words = settings(tmp_path, base=save_tiny_base(tmp_path / "base", tiny_causal()), train__max_steps=4000)
    process = start([sys.executable, "-m", "glider_dist", "train-experts", *words], tmp_path)
    try:
        while not (tmp_path / "run" / "state.json").exists():
            assert process.poll() is None, finish(process)
            os.sched_yield()
        assert read_run(tmp_path / "run").state == "running"
    finally:
        kill(process)
        finish(process)
    assert read_run(tmp_path / "run").state == "killed"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone"], "there is no folder gone"),
        (["show"], "needs one run directory"),
        (["show", "."], "no run directory"),
    ],
)
def test_a_mistake_is_one_sentence(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = command("runs", *words)
    assert outcome.code == 2
    assert said in outcome.errors[0]
    assert find_runs(tmp_path) == []


@pytest.mark.parametrize(
    ("owner", "age", "state", "reason"),
    [
        ("process 4711 on gpu17", 10, "running", ""),
        ("process 4711 on gpu17", 3600, "killed", "nothing is heard of process 4711 on gpu17"),
        (f"process 4711 on {socket.gethostname()}", 10, "killed", "its process is gone"),
    ],
)
def test_a_run_of_another_node_that_was_heard_of_lately_is_running_though_its_lock_is_free_here(
    owner, age, state, reason, tmp_path
):
    (tmp_path / "versions.json").write_text("{}")
    (tmp_path / ".running").write_text(owner)
    (tmp_path / "state.json").write_text(json.dumps({"state": "running", "updated": time.time() - age}))
    found = read_run(tmp_path)
    assert (found.state, found.reason) == (state, reason)
