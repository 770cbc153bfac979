"""A mistake on several ranks: told once, whoever sees it, and every rank ends with code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from small_jobs import (
    HELD_IN,
    Outcome,
    finish,
    free_port,
    kill,
    launch,
    settings,
    snapshot,
    start,
    write_tasks,
)

from glider_dist.testing import random_pool, tiny_causal

pytestmark = pytest.mark.jobs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tasks(tmp_path / "tasks")
    return tmp_path


def start_together(folders: Sequence[Path], arguments: Sequence[Sequence[str]]) -> list[Outcome]:
    """Start a rank in each folder with its own arguments, without a launcher that ends the others."""
    env = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank, (where, words) in enumerate(zip(folders, arguments, strict=True)):
        program = [sys.executable, "-m", "glider_dist", *words]
        processes.append(start(program, where, RANK=str(rank), LOCAL_RANK=str(rank), **env))
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                kill(process)


def told_once(outcomes: Sequence[Outcome]) -> str:
    """The one sentence of all ranks, every one of which has ended with code 2 and without a traceback."""
    assert [outcome.code for outcome in outcomes] == [2] * len(outcomes), outcomes
    assert not [outcome.err for outcome in outcomes if "Traceback" in outcome.err]
    messages = [message for outcome in outcomes for message in outcome.errors]
    assert len(messages) == 1, outcomes
    return messages[0]


def test_two_ranks_with_different_configurations_are_refused_in_one_sentence(folder: Path, base: Path) -> None:
    before = snapshot(folder)
    words = [["train-experts", *settings(folder, base=base, seed=rank)] for rank in (0, 1)]
    message = told_once(start_together([folder, folder], words))
    assert "rank 1 has another configuration than rank 0" in message
    assert snapshot(folder) == before


def test_a_mistake_before_the_ranks_have_met_is_told_once(folder: Path) -> None:
    outcomes = start_together([folder] * 3, [["evaluate", "sed=1"]] * 3)
    assert "'sed'" in told_once(outcomes)


def test_a_mistake_under_srun_is_told_once_though_no_rank_has_read_the_variables(folder: Path) -> None:
    step = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NODEID": "0", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    # As in containers, each rank has a parent of its own.
    words = ["sh", "-c", f"{sys.executable} -m glider_dist evaluate sed=1; exit $?"]
    processes = [start(words, folder, **step, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in "012"]
    try:
        assert "'sed'" in told_once([finish(process) for process in processes])
    finally:
        for process in processes:
            if process.poll() is None:
                kill(process)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_one_rank_ends_the_others_too(rank: int, folder: Path, base: Path) -> None:
    # A relative path means something else on a rank that was started elsewhere.
    words = ["train-experts", *settings(folder, base=base, tasks__path="tasks")]
    folders = [folder, folder]
    folders[rank] = folder / "elsewhere"
    folders[rank].mkdir()
    message = told_once(start_together(folders, [words, words]))
    assert "tasks.path" in message
    assert message.startswith("rank 1: ") == (rank == 1)


@pytest.mark.parametrize(
    ("stage", "change", "needles"),
    [
        ("train-experts", {"base": "gone"}, ["gone"]),
        pytest.param("index", {"embedder": "gone"}, ["embedder", "gone"], marks=pytest.mark.slow),
        pytest.param(
            "describe",
            {"run_dir": "tasks/tasks.json/run"},
            ["run_dir", "tasks.json/run cannot be written"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "train-experts", {"pool": "tasks/tasks.json/pool"}, ["tasks.json/pool"], marks=pytest.mark.slow
        ),
    ],
)
def test_a_mistake_on_several_ranks_is_told_once_and_the_launcher_ends_with_code_2(
    stage: str, change: dict[str, str], needles: list[str], folder: Path, base: Path
) -> None:
    pool = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN[:2])
    for expert in pool.experts():
        expert.update_card(descriptions=["A description."])
    before = snapshot(folder)
    words = settings(folder, **{"base": base, **{key: folder / value for key, value in change.items()}})
    outcome = launch(folder, 2, [stage, *words], launcher="deepspeed")
    message = told_once([outcome])
    assert all(needle in message for needle in needles), message
    assert snapshot(folder) == before


def test_a_mistake_at_the_port_of_another_job_is_not_that_jobs(folder: Path) -> None:
    port, asked = free_port(), folder / "asked"
    job = (
        "import sys, time, torch.distributed as dist; from datetime import timedelta; from pathlib import Path\n"
        "from glider_dist import mistakes\n"
        f"store = dist.TCPStore('127.0.0.1', {port}, 2, True, timedelta(seconds=60), wait_for_workers=False)\n"
        "before = store.num_keys(); print('open', flush=True)\n"
        "while not Path(sys.argv[1]).exists(): time.sleep(0.05)\n"
        "print(store.num_keys() > before, store.check([mistakes._key('told')]), flush=True)"
    )
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    other = start([sys.executable, "-c", job, str(asked)], folder, RANK="0", **env)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        words = f"{sys.executable} -m glider_dist evaluate sed=1; exit $?"
        outcome = finish(start(["sh", "-c", words], folder, RANK="1", LOCAL_RANK="1", **env))
        assert outcome.code == 2
        assert "'sed'" in outcome.errors[0]
        asked.touch()
        assert other.stdout.readline() == "True False\n"
    finally:
        kill(other)
        finish(other)
