"""The stages train-experts and train-gates: settings of a task, experts that fail, restarts."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import adapters, command, cores, finish, kill, largest_difference, start, write_tasks
from small_jobs import settings as job_settings

from glider_dist.bench import train, train_sharded
from glider_dist.pool import ExpertPool
from glider_dist.testing import save_tiny_base, tiny_causal


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_tasks(tmp_path / "tasks")
    save_tiny_base(tmp_path / "base", tiny_causal())
    return tmp_path


def with_settings(job: Path, **settings_of: dict[str, Any]) -> None:
    index = job / "tasks" / "tasks.json"
    value = json.loads(index.read_text())
    for record in value["tasks"]:
        record["train"] = settings_of.get(record["name"], {})
    index.write_text(json.dumps(value))


def stage(job: Path, name: str, **changes: Any) -> Any:
    with cores(1):
        return command(name, *job_settings(job, base=job / "base", **changes))


def test_a_task_has_its_own_training_settings_and_the_others_do_not_notice(job):
    assert stage(job, "train-experts").code == 0
    plain = adapters(job / "pool")
    with_settings(job, copy={"max_steps": 3, "learning_rate": 1e-4, "eval_examples": 1})
    assert stage(job, "train-experts", pool=job / "other").code == 0
    other = adapters(job / "other")
    training = ExpertPool.open(job / "other").expert("copy").card()["training"]
    assert (training["steps"], training["learning_rate"]) == (3, 1e-4)
    assert training["validation_examples"] == 1
    assert ExpertPool.open(job / "other").expert("upper").card()["training"]["validation_examples"] == 4
    for key, value in plain["upper"].items():
        assert torch.equal(value, other["upper"][key])
    assert any(not torch.equal(value, other["copy"][key]) for key, value in plain["copy"].items())


@pytest.mark.parametrize(
    ("settings_of", "said"),
    [
        ({"learning_rat": 1.0}, "learning_rat"),
        ({"max_steps": 0}, "train.max_steps is 0"),
        ({"max_steps": "x"}, "'x'"),
        ({"save_steps": 5}, "save_steps is the whole job's; set train.save_steps in the configuration"),
    ],
)
def test_a_wrong_setting_of_a_task_is_named_before_anything_is_trained(job, settings_of, said):
    with_settings(job, copy=settings_of)
    outcome = stage(job, "train-experts")
    assert outcome.code == 2
    assert "the settings of task 'copy' under 'train'" in outcome.errors[0]
    assert said in outcome.errors[0]
    assert not (job / "pool").exists()


def test_an_expert_that_diverges_is_named_by_its_card_and_by_the_exit_code(job):
    with_settings(job, copy={"learning_rate": 1e25})
    changes = {"train__max_steps": 12, "train__max_failures": 3}
    outcome = stage(job, "train-experts", **changes)
    assert outcome.code == 2
    assert (
        "1 of 3 experts stopped early: copy (the loss or its gradient was not finite in 3 steps"
        in outcome.errors[0]
    )
    pool = ExpertPool.open(job / "pool")
    assert set(pool.names) == {"copy", "last", "upper"}
    card = pool.expert("copy").card()
    assert "not finite" in card["training"]["stopped"]
    assert pool.expert("last").card()["scores"]["validation_loss"] > 0
    assert all(value.isfinite().all() for value in adapters(job / "pool")["copy"].values())
    assert stage(job, "train-experts", **changes).code == 0


@pytest.mark.jobs
def test_a_killed_stage_goes_on_in_the_middle_of_its_experts(job):
    changes: dict[str, Any] = {"train__max_steps": 40, "train__save_steps": 1}
    words = [sys.executable, "-m", "glider_dist", "train-experts"]
    with cores(1):
        process = start([*words, *job_settings(job, base=job / "base", **changes)], job)
    unfinished = job / "run" / "checkpoints" / "expert"
    deadline = time.monotonic() + 180
    while len({path.parent for path in unfinished.glob("*/step-*.safetensors")}) < 3:
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.001)
    kill(process)
    finish(process)
    assert ExpertPool.open(job / "pool").names == ()
    outcome = stage(job, "train-experts", **changes)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("goes on after step") == 3
    points = [json.loads(line) for line in (job / "run" / "metrics.jsonl").read_text().splitlines()]
    curve = [point["step"] for point in points if "expert/loss" in point]
    # Steps that were done and not kept are done, and shown, again.
    assert curve[-1] == 40
    assert sorted(set(curve)) == list(range(1, 41))
    assert curve.count(1) == 1
    steps = json.loads((job / "run" / "state.json").read_text())["progress"]
    assert steps["done"] == steps["total"] == 120
    assert list(unfinished.iterdir()) == []
    assert stage(job, "train-experts", **{**changes, "pool": job / "whole", "run_dir": job / "run2"}).code == 0
    assert largest_difference(adapters(job / "whole"), adapters(job / "pool")) == 0.0


PARTS = ("batches", "mixing")


def test_the_benchmark_compares_the_ways_on_any_base_and_keeps_its_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "ROUNDS", 1)
    monkeypatch.setattr(train, "EXPERTS", 3)
    base = str(save_tiny_base(tmp_path / "base", tiny_causal(vocab_size=40000)))
    train.run(tmp_path, ["batches", "mixing"], base)
    printed = capsys.readouterr().out
    assert "2 rows a step: together is" in printed
    assert "64 experts" in printed
    files = sorted(path.name for path in tmp_path.glob("*.json"))
    assert files == ["bench_train_batches.json", "bench_train_mixing.json"]
    kept = {part: json.loads((tmp_path / f"bench_train_{part}.json").read_text())["rows"] for part in PARTS}
    assert [(row["batch"], row["way"]) for row in kept["batches"]] == [
        (batch, way) for batch in (2, 16) for way in ("one after another", "together")
    ]
    assert [(row["tokens"], row["experts"]) for row in kept["mixing"]] == [
        (64 * length, experts) for length in (16, 64) for experts in (1, 4, 16, 64)
    ]
    assert all(row["s"] > 0 for row in kept["batches"] + kept["mixing"])


@pytest.mark.jobs
@pytest.mark.slow
def test_the_benchmark_sees_half_of_the_base_under_zero_3(tmp_path, capsys):
    train_sharded.run(str(save_tiny_base(tmp_path, tiny_causal(vocab_size=40000))))
    columns = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    kept = {line[1]: float(line[3]) for line in columns if line[1:2] in (["replicated"], ["ZeRO 3"])}
    assert kept["ZeRO 3"] == pytest.approx(kept["replicated"] / 2, rel=0.02)
