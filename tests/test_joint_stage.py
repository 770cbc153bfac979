"""The stage train-joint on a tiny base: from a pool to a better one, on two ranks and in one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import (
    HELD_IN,
    adapters,
    command,
    cores,
    largest_difference,
    launch,
    settings,
    snapshot,
    write_tasks,
)
from transformers import AutoModelForCausalLM

from glider_dist.pool import ExpertPool
from glider_dist.semantics import describe
from glider_dist.testing import random_pool

pytestmark = [
    pytest.mark.jobs,
    pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="ranks cannot be pinned to cores here"),
]


class Job:
    """A folder with tasks, and a pool of random experts of different ranks, described and indexed."""

    def __init__(self, folder: Path, base: Path, gates: bool = True):
        self.folder, self.base = folder, base
        folder.mkdir(parents=True, exist_ok=True)
        write_tasks(folder / "tasks")
        model = AutoModelForCausalLM.from_pretrained(base)
        random_pool(self.path, model, list(HELD_IN), ranks=[4, 3, 9], gates=gates, base=str(base))
        for stage in ("describe", "index"):
            self.run(stage)

    @property
    def path(self) -> Path:
        return self.folder / "pool"

    @property
    def pool(self) -> ExpertPool:
        return ExpertPool.open(self.path)

    def words(self, **changes: Any) -> list[str]:
        small = {"train__learning_rate": 2e-3, "router__alpha_in": 3.0, "router__alpha_out": 1.0}
        return settings(self.folder, **{"base": self.base, **small, **changes})

    def run(self, stage: str, **changes: Any) -> Any:
        with cores(1):
            outcome = command(stage, *self.words(**changes))
        assert outcome.code == 0, outcome.err
        return outcome

    def refused(self, **changes: Any) -> str:
        """The one sentence of a run that must not change the pool."""
        before = snapshot(self.path)
        with cores(1):
            outcome = command("train-joint", *self.words(**changes))
        assert outcome.code == 2, outcome.err
        assert snapshot(self.path) == before
        (error,) = outcome.errors
        return str(error)

    def losses(self) -> list[float]:
        return [point[1] for point in self.pool.expert("copy").card()["joint"][-1]["validation"]]


@pytest.fixture
def job(tmp_path: Path, base: Path) -> Job:
    return Job(tmp_path / "job", base)


def test_one_process_makes_new_versions_calibrates_them_and_does_nothing_twice(job: Job):
    job.run("calibrate")
    calibration = json.loads((job.path / "router" / "calibration.json").read_text())
    before = {expert.name: expert.card() for expert in job.pool.experts()}
    job.run("train-joint", router__alpha_in="null", router__alpha_out="null")
    losses = job.losses()
    assert losses[-1] < losses[0]
    for expert in job.pool.experts():
        card = expert.card()
        assert card["joint"][0]["from"]["files"] == before[expert.name]["files"]
        assert card["joint"][0]["tasks"] == list(HELD_IN)
        assert card["descriptions"] == before[expert.name]["descriptions"]
        assert all(
            card["files"][name] != before[expert.name]["files"][name]
            for name in ("adapter_model.safetensors", "gate.safetensors")
        )
    again = json.loads((job.path / "router" / "calibration.json").read_text())
    assert again["made_for"] != calibration["made_for"]
    assert again["made_for"]["index"] == calibration["made_for"]["index"]
    verified = command("pool", "verify", str(job.path))
    assert verified.code == 0, verified.err
    outcome = job.run("evaluate", router__alpha_in="null", router__alpha_out="null")
    assert "made for other experts" not in outcome.err
    there = snapshot(job.path)
    outcome = job.run("train-joint", router__alpha_in="null", router__alpha_out="null")
    assert "done already" in outcome.err
    assert snapshot(job.path) == there


@pytest.mark.slow
def test_a_calibration_that_is_not_made_again_is_called_stale(job: Job):
    job.run("calibrate")
    job.run("train-joint", joint__recalibrate=False)
    outcome = job.run("evaluate", router__alpha_in="null", router__alpha_out="null", evaluate__routers="[glider]")
    assert "made for other experts than the pool has now" in outcome.err


@pytest.mark.parametrize(
    ("stage", "launcher"),
    [
        pytest.param(2, "torchrun", marks=pytest.mark.slow, id="zero 2, torchrun"),
        pytest.param(3, "deepspeed", id="zero 3, deepspeed"),
    ],
)
def test_two_ranks_with_three_experts_end_where_one_process_does(tmp_path: Path, base: Path, stage, launcher):
    alone, two = Job(tmp_path / "alone", base), Job(tmp_path / "two", base)
    changes = {"train__micro_batch_size": 2, "joint__steps": 5, "joint__batch_size": 7}
    alone.run("train-joint", **changes, zero_stage=0)
    words = two.words(**changes, zero_stage=stage, mesh__expert_parallel=2, tracking="offline")
    outcome = launch(two.folder, 2, ["train-joint", *words], launcher)
    assert outcome.code == 0, outcome.err
    assert two.losses() == pytest.approx(alone.losses(), rel=1e-5)
    assert two.losses()[-1] < two.losses()[0]
    # AdamW divides by the gradient's size, and so enlarges the rounding of the smallest ones.
    assert largest_difference(adapters(two.path), adapters(alone.path)) < 1e-3


@pytest.mark.slow
def test_two_ranks_over_a_sharded_base_answer_as_one_process_does(job: Job):
    job.run("train-joint", joint__steps=5)
    routers = "[phatgoose,glider]"
    words = job.words(zero_stage=3, mesh__expert_parallel=2, evaluate__routers=routers)
    outcome = launch(job.folder, 2, ["evaluate", *words])
    assert outcome.code == 0, outcome.err
    job.run("evaluate", run_dir=job.folder / "run of one", evaluate__routers=routers)
    assert answers(job.folder / "run") == answers(job.folder / "run of one")


def answers(run: Path) -> dict[str, list[list[str]]]:
    """Of each router, by query."""
    rows = {path.stem: json.loads(path.read_text()) for path in sorted((run / "rows").glob("*.json"))}
    assert rows
    return {name: [[q["id"], q["prediction"]] for q in row["result"]["queries"]] for name, row in rows.items()}


@pytest.mark.slow
def test_gates_alone_or_chosen_experts_alone_change(job: Job):
    before = adapters(job.path)
    job.run("train-joint", joint__train="gates", joint__gate_learning_rate=0.05)
    after = adapters(job.path)
    for name, tensors in after.items():
        for key, value in tensors.items():
            same = torch.equal(value, before[name][key])
            assert same == ("lora" in key), (name, key)
    job.run("train-joint", joint__experts="[upper]", joint__train="experts")
    last = adapters(job.path)
    for name, tensors in last.items():
        for key, value in tensors.items():
            changed = not torch.equal(value, after[name][key])
            assert changed == (name == "upper" and "lora" in key), (name, key)


def test_training_that_only_hurts_leaves_the_pool_as_it_is(job: Job):
    # Well below the loss of a uniform guess, where a rate far too large ends.
    job.run("train-joint", joint__steps=40, joint__learning_rate=5e-3)
    assert job.losses()[-1] < 5.0
    before = snapshot(job.path)
    outcome = job.run("train-joint", joint__learning_rate=30.0)
    assert "no step was better than the pool is" in outcome.err
    assert snapshot(job.path) == before


def test_a_loss_that_is_not_finite_ends_the_job_with_a_sentence(job: Job):
    assert "the loss is not finite in step 2" in job.refused(
        joint__learning_rate=1e30, train__max_grad_norm=0, train__warmup_ratio=0
    )


def test_wrong_settings_are_refused_before_anything_is_written(job: Job, tmp_path: Path, base: Path):
    assert "clips wrongly" in job.refused(zero_stage=0, mesh__expert_parallel=2)
    assert "cannot train through router.kind=arrow" in job.refused(router__kind="arrow")
    assert "router.local=lag" in job.refused(router__local="lag")
    assert "dispatch=local" in job.refused(zero_stage=1, mesh__expert_parallel=2, dispatch="local")
    assert "no such expert" in job.refused(joint__experts="[nobody]")
    assert "does not divide" in job.refused(zero_stage=1, mesh__expert_parallel=2)
    assert "has experts such as 'copy'" in job.refused(joint__multitask=True)
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    assert "stage is 3" in job.refused(joint__deepspeed=file)
    bare = Job(tmp_path / "bare", base, gates=False)
    assert "has no gate" in bare.refused()
    assert "no gates to train" in bare.refused(router__kind="global")
    bare.run("train-joint", router__kind="global", joint__train="experts")


def test_a_pool_that_another_job_writes_is_not_touched(job: Job):
    from glider_dist.pool.lock import hold_all, holding_pool

    with hold_all(job.path, ["last"]):
        assert "expert 'last'" in (said := job.refused())
        assert "is being written by another job" in said
    # Also where other experts train: a new version of any would change what all are trained through.
    staged = job.path / ".joint" / "experts" / "upper"
    staged.mkdir(parents=True)
    with holding_pool(job.path):
        assert f"pool {job.path} is being written by another job" in job.refused(joint__experts="[copy]")
    assert staged.exists()
    assert not (job.path / ".lock").exists()


def test_the_multitask_baseline_is_one_expert_that_serves_every_task(job: Job):
    changes = {"pool": job.folder / "multitask", "joint__multitask": True, "train__batch_size": 8}
    job.run("train-joint", **changes)
    pool = ExpertPool.open(job.folder / "multitask")
    assert pool.names == ("multitask",)
    card = pool.expert("multitask").card()
    assert card["joint"][0]["tasks"] == list(HELD_IN)
    assert card["scores"]["validation_loss"] < card["joint"][0]["validation"][0][1]
    kept = job.folder / "run" / "checkpoints" / "joint"
    kept.mkdir(parents=True)  # as a job that was killed before it deleted them leaves them
    assert "already" in job.run("train-joint", **changes).err
    assert not kept.exists()
    outcome = job.run("evaluate", pool=pool.path, evaluate__routers="[base,oracle]")
    assert "oracle" in outcome.out


def test_what_a_pool_lacks_is_made_first_if_asked_for(tmp_path: Path, base: Path):
    folder = tmp_path / "fresh"
    folder.mkdir()
    write_tasks(folder / "tasks")
    words = settings(folder, base=base, joint__prepare=True, train__learning_rate=5e-3, train__gate_steps=2)
    with cores(1):
        outcome = command("train-joint", *words)
    assert outcome.code == 0, outcome.err
    pool = ExpertPool.open(folder / "pool")
    assert pool.names == tuple(sorted(HELD_IN))
    assert all(expert.card()["joint"] for expert in pool.experts())
    assert describe.descriptions_of(pool).keys() == set(HELD_IN)
    there = snapshot(folder / "pool")
    with cores(1):
        outcome = command("train-joint", *words)
    assert "done already" in outcome.err
    assert snapshot(folder / "pool") == there


def test_a_job_that_is_to_stop_leaves_the_pool_as_it_was(job: Job):
    before = snapshot(job.path)
    with cores(1):
        outcome = command("train-joint", *job.words(joint__steps=100000, max_minutes=0.05))
    assert outcome.code == 85, outcome.err
    assert snapshot(job.path) == before
