"""The stages on a tiny base: end to end on several ranks, the same result on any number of them, and restarts.

Two jobs are shared by the tests: ``together`` runs all stages in one launch on two ranks, ``apart`` runs each
stage by a command of its own in this process. Every rank computes with one thread, so that their files can be
compared bit for bit.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_jobs import (
    HELD_IN,
    HELD_OUT,
    Outcome,
    adapters,
    command,
    cores,
    finish,
    kill,
    largest_difference,
    launch,
    program,
    settings,
    share_within,
    snapshot,
    start,
    write_tasks,
)

from glider_dist.pool import ExpertPool
from glider_dist.testing import save_tiny_base, tiny_seq2seq

pytestmark = [
    pytest.mark.jobs,
    pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="ranks cannot be pinned to cores here"),
]

STAGES = ("train-experts", "train-gates", "describe", "index", "calibrate", "evaluate")
ROUTERS = ("base", "merged", "phatgoose", "glider", "oracle")
TEXT = "Please repeat the words as they are. Input: sun river stone"


@dataclass(frozen=True)
class Job:
    """A folder with tasks, pool and run, the base, and what its commands printed."""

    folder: Path
    base: Path
    printed: dict[str, Outcome]

    @property
    def pool(self) -> Path:
        return self.folder / "pool"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def words(self, **changes: Any) -> list[str]:
        return settings(self.folder, **{"base": self.base, **changes})

    def all_stages(self, **changes: Any) -> list[str]:
        """The words of a quickstart; given a file, it has no settings of its own."""
        file = self.folder / "job.yaml"
        file.write_text("seed: 0\n")
        return ["quickstart", str(file), TEXT, *self.words(**changes)]

    def done(self, stage: str, *words: str, **changes: Any) -> Outcome:
        """Run a stage in this process on one core; it must succeed."""
        with cores(1):
            outcome = command(stage, *words, *self.words(**changes))
        assert outcome.code == 0, outcome.err
        return outcome

    def rows(self) -> dict[str, Any]:
        return {kind: json.loads((self.run_dir / "rows" / f"{kind}.json").read_text()) for kind in ROUTERS}


def new_job(folder: Path, base: Path, **tasks: Any) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    write_tasks(folder / "tasks", **tasks)
    return Job(folder, base, {})


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Job:
    job = new_job(tmp_path_factory.mktemp("together"), base)
    with cores(2):
        process = start([program("glider-dist"), *job.all_stages(tracking="offline"), "--ranks", "2"], job.folder)
    outcome = finish(process)
    assert outcome.code == 0, outcome.err
    job.printed["quickstart"] = outcome
    return job


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Job:
    job = new_job(tmp_path_factory.mktemp("apart"), base)
    for stage in STAGES:
        job.printed[stage] = job.done(stage)
    job.printed["predict"] = job.done("predict", TEXT)
    return job


@pytest.fixture
def fresh(tmp_path: Path, base: Path) -> Job:
    return new_job(tmp_path, base)


def predictions(job: Job) -> dict[str, list[tuple[str, str, str]]]:
    return {
        kind: [(query["task"], query["id"], query["prediction"]) for query in row["result"]["queries"]]
        for kind, row in job.rows().items()
    }


def answer_lines(outcome: Outcome) -> list[str]:
    lines = outcome.out.splitlines()
    first = lines.index(f"query:  {TEXT}")
    assert lines.count(f"query:  {TEXT}") == 1, "more than one rank printed"
    return [line for line in lines[first : first + 5] if line.startswith(("query:", "answer:", "  "))][:5]


def test_all_stages_run_end_to_end_on_two_ranks(together: Job) -> None:
    pool = ExpertPool.open(together.pool)
    assert pool.names == tuple(sorted(HELD_IN))
    assert pool.missing_gates() == []
    assert all(expert.card()["descriptions"] for expert in pool.experts())
    assert {path.name for path in pool.router_dir.iterdir()} == {"embeddings.safetensors", "calibration.json"}
    printed = together.printed["quickstart"].out
    assert all(f"\n{kind} " in printed for kind in ROUTERS)
    assert answer_lines(together.printed["quickstart"])[1].startswith("answer: ")


def test_the_command_that_is_printed_last_answers_without_another_word(together: Job) -> None:
    line = next(line for line in together.printed["quickstart"].out.splitlines() if "glider-dist predict" in line)
    outcome = command(*shlex.split(line)[1:])
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[1].startswith("answer: ")


def test_the_run_directory_records_what_was_run(together: Job) -> None:
    run = together.run_dir
    config = (run / "config.yaml").read_text()
    assert f"base: {together.base}" in config
    assert "max_steps: 6" in config
    versions = json.loads((run / "versions.json").read_text())
    assert versions["packages"]["torch"]
    assert "quickstart" in versions["command"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = {key for record in metrics for key in record}
    assert {"expert/loss", "expert/learning_rate", "expert/final_loss/p50", "gate/loss"} <= keys
    assert {"calibrate/alpha_in", "evaluate/glider/held_out"} <= keys
    # Quantiles over experts, and never a key per expert.
    assert not [key for key in keys for name in (*HELD_IN, *HELD_OUT) if name in key]
    log = (run / "log.txt").read_text()
    assert all(line in log for line in ("3 experts in", "3 gates in", "described 3 of 3", "glider: "))


def test_tracking_offline_leaves_a_wandb_run_and_off_leaves_none(together: Job, apart: Job) -> None:
    assert list((together.run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert (together.run_dir / "wandb_id").exists()
    assert not (apart.run_dir / "wandb").exists()


def test_the_reports_count_every_query_of_every_task(together: Job) -> None:
    rows = together.rows()
    for kind in ROUTERS:
        queries = rows[kind]["result"]["queries"]
        assert len({(query["task"], query["id"]) for query in queries}) == 16
        assert rows[kind]["result"]["made_with"]["ranks"] == 2
    routed = rows["glider"]["routing"]["tokens_per_expert"]
    assert set(routed) == set(HELD_IN)
    assert sum(routed.values()) > 0


def test_experts_and_gates_are_bit_identical_on_one_rank_and_on_two(together: Job, apart: Job) -> None:
    assert largest_difference(adapters(apart.pool), adapters(together.pool)) == 0.0


def test_the_stages_one_by_one_give_what_one_launch_gives(together: Job, apart: Job) -> None:
    one, other = (load_file(job.pool / "router" / "embeddings.safetensors") for job in (apart, together))
    assert torch.equal(one["owner"], other["owner"])
    assert torch.allclose(one["embeddings"], other["embeddings"], atol=1e-6)
    one, other = (json.loads((job.pool / "router" / "calibration.json").read_text()) for job in (apart, together))
    for key in ("alpha_in", "alpha_out", "threshold"):
        assert one[key] == pytest.approx(other[key], rel=1e-6)
    assert predictions(apart) == predictions(together)
    assert answer_lines(apart.printed["predict"]) == answer_lines(together.printed["quickstart"])


def test_experts_differ_from_each_other_and_have_moved(apart: Job) -> None:
    found = adapters(apart.pool)
    for key in found["copy"]:
        if "lora_B" in key:
            assert found["copy"][key].abs().max() > 0
        assert not torch.equal(found["copy"][key], found["upper"][key])


def test_a_second_run_on_two_ranks_changes_nothing_and_says_so(together: Job) -> None:
    before = {**snapshot(together.pool), **snapshot(together.run_dir / "rows")}
    outcome = launch(together.folder, 2, together.all_stages())
    assert outcome.code == 0, outcome.err
    assert {**snapshot(together.pool), **snapshot(together.run_dir / "rows")} == before
    assert "0 of 3 experts to train" in outcome.err
    assert "0 of 3 gates to train" in outcome.err
    assert answer_lines(outcome) == answer_lines(together.printed["quickstart"])
    first, second = (text.out.split("Run directory")[0] for text in (together.printed["quickstart"], outcome))
    assert second[second.index("router ") :] == first[first.index("router ") :]


def test_a_finished_quickstart_is_shown_again_without_starting_any_rank(together: Job) -> None:
    before = snapshot(together.folder)
    outcome = command(*together.all_stages(), "--ranks", "2")
    assert outcome.code == 0, outcome.err
    assert "starting 2 ranks" not in outcome.err
    assert answer_lines(outcome) == answer_lines(together.printed["quickstart"])
    first = together.printed["quickstart"].out
    assert first[first.index("router ") : first.index("Run directory")] in outcome.out
    after = snapshot(together.folder)
    assert {**after, "job.yaml": None} == {**before, "job.yaml": None}


def test_a_stage_with_nothing_to_do_does_not_even_load_the_base(apart: Job) -> None:
    before = {**snapshot(apart.pool), **snapshot(apart.run_dir / "rows")}
    for stage in STAGES:
        outcome = apart.done(stage, base=apart.folder / "gone")
        if stage == "evaluate":
            assert outcome.out == apart.printed[stage].out
    assert {**snapshot(apart.pool), **snapshot(apart.run_dir / "rows")} == before


def test_another_setting_or_expert_makes_evaluation_start_again(apart: Job, tmp_path: Path) -> None:
    job = Job(shutil.copytree(apart.folder, tmp_path / "copy"), apart.base, {})
    before = snapshot(job.run_dir / "rows")
    job.done("evaluate", evaluate__routers="[base]", evaluate__max_new_tokens=3)
    after = snapshot(job.run_dir / "rows")
    assert after["base.json"] != before["base.json"]
    assert {**after, "base.json": None} == {**before, "base.json": None}


def test_rows_that_are_done_are_kept_when_others_are_added(apart: Job, tmp_path: Path) -> None:
    job = Job(shutil.copytree(apart.folder, tmp_path / "copy"), apart.base, {})
    before = snapshot(job.run_dir / "rows")
    (job.run_dir / "rows" / "merged.json").unlink()
    job.done("evaluate")
    after = snapshot(job.run_dir / "rows")
    assert {kind: after[f"{kind}.json"] for kind in ROUTERS if kind != "merged"} == {
        kind: before[f"{kind}.json"] for kind in ROUTERS if kind != "merged"
    }
    assert predictions(job) == predictions(apart)


def test_a_new_task_trains_its_own_expert_only(apart: Job, tmp_path: Path) -> None:
    job = Job(shutil.copytree(apart.folder, tmp_path / "copy"), apart.base, {})
    shutil.rmtree(job.pool / "experts" / "upper")
    before = snapshot(job.pool)
    outcome = job.done("train-experts")
    assert "1 of 3 experts to train" in outcome.err
    after = snapshot(job.pool)
    assert {key: after[key] for key in before} == before
    assert {key.split("/")[1] for key in after.keys() - before.keys()} == {"upper"}
    job.done("train-gates")
    assert largest_difference(adapters(apart.pool), adapters(job.pool)) == 0.0


@pytest.mark.parametrize(("replicas", "tolerance"), [("1", 0.0), ("null", 1e-3)])
@pytest.mark.slow
def test_more_ranks_than_tasks_train_the_same_experts(
    apart: Job, tmp_path: Path, replicas: str, tolerance: float
) -> None:
    job = new_job(tmp_path, apart.base)
    words = job.words(tasks__held_in="[copy,last]", tasks__held_out="[first]", train__replicas=replicas)
    outcome = launch(job.folder, 3, ["train-experts", *words])
    assert outcome.code == 0, outcome.err
    assert "2 of 2 experts to train on 3 ranks" in outcome.err
    assert ("3 ranks train each expert together" in outcome.err) == (replicas == "null")
    wanted = {
        name: {key: value for key, value in tensors.items() if "lora" in key}
        for name, tensors in adapters(apart.pool).items()
        if name != "upper"
    }
    assert largest_difference(wanted, adapters(job.pool)) <= tolerance


def test_after_a_kill_only_what_is_missing_is_trained_and_the_result_is_the_same(fresh: Job, apart: Job) -> None:
    with cores(1):
        # One at a time: in one wave all of them would be done at once.
        words = fresh.words(train__experts_in_flight=1)
        process = start([sys.executable, "-m", "glider_dist", "train-experts", *words], fresh.folder)
    experts = fresh.pool / "experts"
    deadline = time.monotonic() + 180
    while not ((fresh.pool / "pool.json").exists() and ExpertPool.open(fresh.pool).names):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.001)
    kill(process)
    finish(process)
    finished = ExpertPool.open(fresh.pool).names
    assert 1 <= len(finished) < 3, "the kill came too late to test anything"
    before = {name: snapshot(experts / name) for name in finished}
    outcome = fresh.done("train-experts")
    assert f"{3 - len(finished)} of 3 experts to train" in outcome.err
    assert {name: snapshot(experts / name) for name in finished} == before
    fresh.done("train-gates")
    assert largest_difference(adapters(apart.pool), adapters(fresh.pool)) == 0.0


def test_a_base_sharded_by_zero_3_gives_the_same_experts_and_answers(fresh: Job, apart: Job) -> None:
    # Three experts on two ranks: one rank waits in dummies while the other trains and answers.
    outcome = launch(fresh.folder, 2, fresh.all_stages(zero_stage=3))
    assert outcome.code == 0, outcome.err
    # Sharded layers round differently, and Adam divides by the gradient's size: a rounding in one that is nearly
    # zero grows. 38 of the 19,488 values differed by more than 1e-5 of their tensor's largest, by 3e-4 at most.
    here, there = adapters(apart.pool), adapters(fresh.pool)
    assert largest_difference(here, there) <= 1e-3
    assert share_within(1e-5, here, there) >= 0.99
    assert predictions(fresh) == predictions(apart)
    assert answer_lines(outcome)[:2] == answer_lines(apart.printed["predict"])[:2]


def test_gradient_checkpointing_changes_no_expert_and_no_gate(fresh: Job, apart: Job) -> None:
    fresh.done("train-experts", train__gradient_checkpointing=True)
    fresh.done("train-gates", train__gradient_checkpointing=True)
    assert largest_difference(adapters(apart.pool), adapters(fresh.pool)) <= 1e-6


@pytest.mark.slow
def test_micro_batches_change_an_expert_by_rounding_only(fresh: Job, apart: Job) -> None:
    fresh.done("train-experts", train__micro_batch_size=1)
    fresh.done("train-gates", train__micro_batch_size=3)
    # Adam divides by the gradient's size, so that the rounding of a tiny gradient may grow.
    assert largest_difference(adapters(apart.pool), adapters(fresh.pool)) <= 1e-3


@pytest.mark.slow
def test_another_seed_gives_other_experts(fresh: Job, apart: Job) -> None:
    fresh.done("train-experts", tasks__held_in="[copy]", seed=1)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert not torch.equal(adapters(fresh.pool)["copy"][key], adapters(apart.pool)["copy"][key])


def test_an_encoder_decoder_runs_through_every_stage(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", tiny_seq2seq())
    job = new_job(tmp_path, base)
    words: dict[str, Any] = {"train__max_steps": 3, "lora__targets": "[q,v,wo]"}
    for stage in STAGES:
        job.done(stage, **words)
    assert set(predictions(job)) == set(ROUTERS)
    config = json.loads((job.pool / "experts" / "copy" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert "answer: " in job.done("predict", TEXT, **words).out
