"""A wish to stop, by a signal to any rank or a time limit: all is kept, code 85, and the next start goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import rank_checkpoints as work
import torch
from safetensors.torch import load_file
from small_jobs import (
    HELD_IN,
    adapters,
    command,
    cores,
    describe_and_index,
    finish,
    free_port,
    kill,
    largest_difference,
    program,
    settings,
    start,
    write_tasks,
)

from glider_dist.cli import ended_by_signals
from glider_dist.errors import EXIT_STOPPED, Stopped
from glider_dist.evaluation.partial import PartialLosses
from glider_dist.parallel.stopping import STOP_FILE, StopWish
from glider_dist.pool import ExpertPool
from glider_dist.pool.files import read_json
from glider_dist.semantics.embedder import Embedder
from glider_dist.semantics.global_router import Ahead
from glider_dist.semantics.index import FILE, load_index
from glider_dist.testing import LocalRanks, random_pool, tiny_causal

LONG: dict[str, Any] = {"train__max_steps": 40, "train__eval_every": 20, "train__save_steps": 5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Any]:
    """The experts of an uninterrupted job."""
    folder = tmp_path_factory.mktemp("whole")
    write_tasks(folder / "tasks")
    with cores(1):
        assert command("train-experts", *settings(folder, base=base, **LONG)).code == 0
    return adapters(folder / "pool")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tasks(tmp_path / "tasks")
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_a_wish_and_afterwards_means_what_it_did_before(number):
    before = signal.getsignal(number)
    stop = StopWish()
    with stop.watching():
        assert not stop.wished
        os.kill(os.getpid(), number)
        assert stop.wished
        stop.agree(False)  # all was done anyway
        with pytest.raises(Stopped, match=number.name):
            stop.agree(True)
    assert signal.getsignal(number) == before


def test_a_signal_before_the_work_ends_the_process_as_stopped_and_after_it_changes_nothing():
    with pytest.raises(SystemExit) as ended, ended_by_signals(StopWish()):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert ended.value.code == EXIT_STOPPED
    stop = StopWish()
    with ended_by_signals(stop):
        with stop.watching():
            pass
        os.kill(os.getpid(), signal.SIGUSR1)


def test_the_time_limit_is_a_wish():
    stop = StopWish(max_minutes=0.1 / 60)
    assert not stop.wished
    time.sleep(0.15)
    assert stop.wished
    with pytest.raises(Stopped, match="max_minutes"):
        stop.agree(True)


def starts_until_done(stage: str, words: list[str]) -> int:
    """Start a stage again until it is done; every start but the last ends with the code of a stop."""
    for starts in range(1, 200):
        with cores(1):
            outcome = command(stage, *words)
        if outcome.code == 0:
            return starts
        assert outcome.code == EXIT_STOPPED, outcome.err
        assert "stopped (max_minutes=1e-09 have passed)" in outcome.err
    raise AssertionError("never done")


def test_a_job_that_may_take_one_step_a_start_ends_with_the_same_experts_and_gates(folder, base, whole):
    short: dict[str, Any] = {"base": base, "train__max_steps": 6, "train__eval_every": 4}
    assert starts_until_done("train-experts", settings(folder, max_minutes=1e-9, **short)) == 6
    assert starts_until_done("train-gates", settings(folder, max_minutes=1e-9, **short)) == 4
    other = {**short, "pool": folder / "other", "run_dir": folder / "run2"}
    for stage in ("train-experts", "train-gates"):
        with cores(1):
            assert command(stage, *settings(folder, **other)).code == 0
    assert largest_difference(adapters(folder / "pool"), adapters(folder / "other")) == 0.0
    assert not list((folder / "run" / "checkpoints").rglob("*.*"))


@pytest.mark.jobs
def test_checkpoints_alone_are_enough_to_go_on_with_the_same_wandb_run(folder: Path, base: Path) -> None:
    words: dict[str, Any] = {"base": base, "train__max_steps": 6, "tracking": "offline"}
    job = [sys.executable, "-m", "glider_dist", "train-experts"]
    with cores(1):
        process = start([*job, *settings(folder, max_minutes=1e-9, **words)], folder)
    assert finish(process).code == EXIT_STOPPED
    shutil.copytree(folder / "run" / "checkpoints", folder / "moved" / "checkpoints")
    with cores(1):
        process = start([*job, *settings(folder, **{**words, "run_dir": folder / "moved"})], folder)
    outcome = finish(process)
    assert outcome.code == 0, outcome.err
    assert "goes on after step 1" in outcome.err
    before, after = ((folder / run / "wandb_id").read_text() for run in ("run", "moved"))
    assert before == after
    assert list((folder / "moved" / "wandb").glob(f"offline-run-*/run-{after.strip()}.wandb"))


def add_choices(folder: Path, task: str) -> None:
    """Give a task's test examples two choices each, the right one and a word more."""
    path = folder / "tasks" / task / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["choices"] = [row["target"], f"{row['target']} moon"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("by_choice", "least", "most"), [(False, 4, 6), (True, 8, 10)])
def test_an_evaluation_that_may_take_one_batch_a_start_gives_the_same_rows(by_choice, least, most, folder, base):
    pool = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN)
    describe_and_index(pool)
    words: dict[str, Any] = {"base": base, "evaluate__routers": "[base,phatgoose]", "evaluate__batch_size": 6}
    if by_choice:
        words["evaluate__rank_classification"] = True
        for task in HELD_IN[:2]:
            add_choices(folder / "tasks", task)
    # 16 queries: three batches, and three more for two choices of 8 of them; the last of a row does not count as
    # broken off.
    starts = starts_until_done("evaluate", settings(folder, max_minutes=1e-9, **words))
    assert least <= starts <= most
    with cores(1):
        assert command("evaluate", *settings(folder, **{**words, "run_dir": folder / "run2"})).code == 0

    def answers(run: str, kind: str) -> Any:
        row = read_json(folder / run / "rows" / f"{kind}.json")
        return row["result"]["queries"], row["routing"]["tokens_per_expert"]

    for kind in ("base", "phatgoose"):
        assert answers("run", kind) == answers("run2", kind)
    assert list((folder / "run" / "rows" / "partial").iterdir()) == []


def test_a_calibration_that_may_try_one_alpha_a_start_chooses_the_same(folder, base, monkeypatch):
    pool = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN)
    describe_and_index(pool)
    words: dict[str, Any] = {"base": base, "calibrate__alphas": "[1,3,10,30]"}
    stop, add, tried = folder / "stop", PartialLosses.add, []

    def stop_after(self: PartialLosses, alpha: float, nll: Any) -> None:
        add(self, alpha, nll)
        tried.append(alpha)
        stop.touch()

    monkeypatch.setattr(PartialLosses, "add", stop_after)
    monkeypatch.setattr("glider_dist.parallel.stopping._LOOK_SECONDS", 0.0)
    monkeypatch.setenv(STOP_FILE, str(stop))
    codes = []
    for _ in range(4):
        stop.unlink(missing_ok=True)
        with cores(1):
            codes.append(command("calibrate", *settings(folder, **words)).code)
    assert codes == [EXIT_STOPPED] * 3 + [0]
    assert tried == [1.0, 3.0, 10.0, 30.0]
    assert not (folder / "run" / "calibrate.json").exists()
    file = pool.router_dir / "calibration.json"
    chosen = read_json(file)
    file.unlink()
    monkeypatch.delenv(STOP_FILE)
    with cores(1):
        assert command("calibrate", *settings(folder, **{**words, "run_dir": folder / "run2"})).code == 0
    assert read_json(file) == chosen


def test_losses_of_another_calibration_and_a_damaged_file_are_computed_again(folder, base):
    pool = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN)
    describe_and_index(pool)
    words: dict[str, Any] = {"base": base, "calibrate__alphas": "[1,3]"}
    kept = folder / "run" / "calibrate.json"
    for left in (None, '{"key": "of another", "nll": {"1.0": [0.5], "3.0": [0.5]}}', '{"key": '):
        if left is not None:
            kept.write_text(left)
        with cores(1):
            assert command("calibrate", *settings(folder, **words)).code == 0
        found = read_json(pool.router_dir / "calibration.json")
        assert found["queries"] == 6
        assert found["loss"] > 0.9  # a random base
        (pool.router_dir / "calibration.json").unlink()


def test_an_index_that_may_embed_two_experts_a_start_embeds_each_of_them_once(folder, base, monkeypatch):
    pool = random_pool(folder / "pool", tiny_causal(), experts=[f"expert_{place}" for place in range(7)])
    for expert in pool.experts():
        expert.update_card(descriptions=[f"Does what {expert.name} does."])
    monkeypatch.setattr("glider_dist.semantics.indexing._AT_ONCE", 2)
    embedded: list[str] = []
    compute = Embedder.compute

    def noted(self: Embedder, texts: Any) -> Any:
        embedded.extend(texts)
        return compute(self, texts)

    monkeypatch.setattr(Embedder, "compute", noted)
    words = {"base": base, "tasks__held_in": "[]", "tasks__held_out": "[]"}
    assert starts_until_done("index", settings(folder, max_minutes=1e-9, **words)) == 4
    assert sorted(embedded) == sorted(f"Does what {name} does." for name in pool.names)
    index = load_index(pool.router_dir / FILE, pool.names)
    assert index.rows is not None
    assert not (folder / "run" / "index.safetensors").exists()


@pytest.mark.slow
def test_average_activations_of_one_expert_a_start_are_those_of_one_start(folder, base):
    found = []
    for name, limit in (("pool", 1e-9), ("other", 1e9)):
        pool = random_pool(folder / name, tiny_causal(), experts=HELD_IN)
        words: dict[str, Any] = {"base": base, "pool": folder / name, "max_minutes": limit}
        starts = starts_until_done("average-activations", settings(folder, **words))
        assert starts == (3 if limit < 1 else 1)
        found.append([load_file(pool.path / "experts" / name / "activation.safetensors") for name in HELD_IN])
    for mine, theirs in zip(*found, strict=True):
        assert all(torch.equal(mine[site], theirs[site]) for site in theirs)


@pytest.mark.jobs
@pytest.mark.parametrize(
    ("zero_stage", "replicas"),
    [(0, 1), (0, 2), *(pytest.param(3, replicas, marks=pytest.mark.slow) for replicas in (1, 2))],
)
def test_a_signal_to_one_rank_stops_all_of_them_and_they_go_on(
    zero_stage: int, replicas: int, folder: Path, base: Path, whole: Any, local_ranks: Callable[[int], LocalRanks]
) -> None:
    words = settings(folder, base=base, zero_stage=zero_stage, train__replicas=replicas, **LONG)
    found = local_ranks(2).run(work.stage, "train-experts", words, 12, 1, signal.SIGUSR1)
    assert found == ["stopped: SIGUSR1"] * 2
    assert ExpertPool.open(folder / "pool").names == ()
    kept = {path.name: sorted(path.glob("step-*")) for path in (folder / "run/checkpoints/expert").iterdir()}
    assert all(kept[name] for name in HELD_IN)
    assert local_ranks(2).run(work.stage, "train-experts", words) == ["done"] * 2
    assert largest_difference(whole, adapters(folder / "pool")) <= (1e-3 if zero_stage or replicas > 1 else 0.0)


@pytest.mark.jobs
def test_the_code_85_comes_through_the_deepspeed_launcher(folder: Path, base: Path) -> None:
    words = settings(folder, base=base, **{**LONG, "train__max_steps": 4000})
    launcher = [program("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    with cores(2):
        process = start([*launcher, "--module", "glider_dist", "train-experts", *words], folder)
    try:
        deadline = time.monotonic() + 180
        while not list((folder / "run" / "checkpoints").glob("expert/*/step-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "--local_rank=1" in child.cmdline()
        ]
        assert len(ranks) == 1
        ranks[0].send_signal(signal.SIGTERM)
        outcome = finish(process)
    finally:
        if process.poll() is None:
            kill(process)
    assert outcome.code == EXIT_STOPPED, outcome.err
    assert outcome.err.count("stopped (SIGTERM); the same command goes on") == 1
    assert "Traceback" not in outcome.err


@pytest.mark.jobs
@pytest.mark.slow
def test_a_signal_to_the_quickstart_stops_its_ranks(folder: Path, base: Path) -> None:
    (folder / "job.yaml").write_text("seed: 0\n")
    words = settings(folder, base=base, **{**LONG, "train__max_steps": 4000})
    with cores(2):
        process = start(
            [sys.executable, "-m", "glider_dist", "quickstart", "job.yaml", "--ranks", "2", *words], folder
        )
    deadline = time.monotonic() + 180
    while not list((folder / "run" / "checkpoints").glob("expert/*/step-*")):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    outcome = finish(process)
    assert outcome.code == EXIT_STOPPED, outcome.err
    assert not list((folder / "run").glob(".stop*"))


def test_similarities_that_nobody_waits_for_any_more_are_not_asked_for():
    asked = []

    def similarity(queries: list[str]) -> torch.Tensor:
        asked.append(queries)
        time.sleep(0.05)
        return torch.zeros(len(queries), 2)

    router: Any = SimpleNamespace(similarity=similarity, index=SimpleNamespace(names=("a", "b")))
    queries = [str(number) for number in range(100)]
    with contextlib.suppress(RuntimeError), Ahead(router, queries, [[number] for number in range(100)]) as ahead:
        assert ahead[[0]].shape == (1, 2)
        raise RuntimeError("out of memory")
    assert len(asked) <= 3
