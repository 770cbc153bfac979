"""The measurements behind ``bench``, small: they measure what they say and check it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from refusals import one_sentence
from safetensors.torch import load_file
from small_jobs import command, describe_and_index, settings, snapshot, write_tasks

from glider_dist.bench import arrow, dispatch, forward, without_gates
from glider_dist.bench.without_gates import randomised
from glider_dist.cli import run_stage
from glider_dist.errors import GliderError
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import GATE_FILE, WEIGHTS_FILE
from glider_dist.settings import read_config
from glider_dist.testing import random_pool, save_tiny_base, tiny_causal


def test_arrow_is_timed_in_turns_with_pefts_and_their_logits_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arrow, "COUNTS", (3,))
    monkeypatch.setattr(arrow, "ROUNDS", 2)
    arrow.run(tmp_path)
    (row,) = json.loads((tmp_path / "bench_arrow.json").read_text())["rows"]
    assert row["adapters"] == 3
    assert row["distance"] < 1e-4
    assert all(len(row[side]["seconds"]) == 2 and row[side]["first"] > 0 for side in arrow.SIDES)
    assert row["ratio"] == pytest.approx(row["peft"]["median"] / row["ours"]["median"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].split()[0] == "3"
    assert len({len(line) for line in printed[1:]}) == 1


def test_a_routed_model_is_timed_against_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "ON_A_CPU", (forward.Work(2, 5), forward.Work(2, 4, new=3)))
    forward.run(tmp_path, (forward.Shape("tiny", 32, 48, 2, 4, 2, 300, (3,)),))
    rows = json.loads((tmp_path / "bench_forward.json").read_text())["rows"]
    assert [(row["base"], row["experts"], row["work"]) for row in rows] == [
        ("tiny", 3, "2 x 5"),
        ("tiny", 3, "2 x 4 + 3"),
    ]
    assert all(row[key] > 0 for row in rows for key in ("base ms", "phatgoose / base", "glider / base"))


def test_routing_without_gates_is_compared_with_random_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ("copy", "upper", "last")
    write_tasks(tmp_path / "tasks", held_in=tasks)
    base = save_tiny_base(tmp_path / "base", tiny_causal())
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=tasks, base=str(base))
    describe_and_index(pool)
    before = snapshot(pool.path)
    words = settings(tmp_path, base=base, router__local="arrow", evaluate__routers="[base,arrow,glider]")
    run_stage("bench", read_config(None, words), without_gates.run)
    text = (tmp_path / "run" / "without_gates.txt").read_text()
    assert text in capsys.readouterr().out
    rows = [line.split("  ")[0] for line in text.splitlines()[2:7]]
    assert rows == ["base", "arrow", "glider", "arrow, random", "glider, random"]
    assert snapshot(pool.path) == before
    trained, control = (ExpertPool.open(tmp_path / "run" / "pools" / name) for name in ("trained", "random"))
    for name in tasks:
        source = load_file(pool.expert(name).folder / WEIGHTS_FILE)
        for made, same in ((trained, True), (control, False)):
            found = load_file(made.expert(name).folder / WEIGHTS_FILE)
            assert not (made.expert(name).folder / GATE_FILE).exists()
            for key, value in source.items():
                assert torch.equal(found[key], value) == same
                assert found[key].shape == value.shape
    with pytest.raises(GliderError, match=r"cannot run 'glider' with router\.local=gate"):
        run_stage("bench", read_config(None, [*words, "router.local=gate"]), without_gates.run)


def test_random_weights_keep_size_and_follow_from_the_seed() -> None:
    tensors = {"a": torch.full((40, 50), 3.0), "b": torch.zeros(4, 5, dtype=torch.bfloat16)}
    made = randomised(tensors, 7)
    assert made["a"].square().mean().sqrt() == pytest.approx(3.0, rel=0.1)
    assert not made["b"].any()
    assert made["b"].dtype == torch.bfloat16
    assert torch.equal(made["a"], randomised(tensors, 7)["a"])
    assert not torch.equal(made["a"], randomised(tensors, 8)["a"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "bench knows layer, forward, arrow, dispatch, joint, train, checkpoint, embeddings, evaluate, "),
        ("speed", "not 'speed'"),
        ("layer arrow", "bench layer takes no more words, not 'arrow'"),
        ("evaluate arrow", "bench evaluate takes no more words, not 'arrow'"),
        ("train batches speed", "bench train knows startup, sharded, mixing, batches, not 'speed'"),
        ("train batches rows=2", "takes run_dir=, not rows="),
        ("train job.yaml", "bench train takes no configuration file (job.yaml)"),
        ("train --ranks 2", "--ranks belongs to bench dispatch and bench joint, not to bench train"),
        ("dispatch --ranks 1", "bench dispatch compares ranks, and one has nothing to exchange"),
        ("joint --ranks 1", "bench joint compares ranks, and one has nothing to exchange"),
        (
            "train batches --dry-run",
            "--dry-run belongs to stages that plan knows",
        ),
        ("embeddings requests=many", "requests needs a number from 2 on, not 'many'"),
        ("embeddings train.seed=1", "takes run_dir=, peer=, requests=, not train.seed="),
    ],
)
def test_what_no_measurement_takes_is_refused_before_anything_runs(
    words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in one_sentence(command("bench", *words.split()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.jobs
def test_exchanges_of_ranks_that_do_not_divide_the_experts_are_measured_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "EXPERTS", (8,))
    monkeypatch.setattr(dispatch, "WORKLOADS", ("uniform",))
    dispatch.run(tmp_path, 3, "1")
    found = json.loads((tmp_path / "bench_dispatch.json").read_text())
    assert [(row["experts"], row["plain / auto"]) for row in found["rows"]] == [(8, None)]
    assert found["deepspeed_moe"] == []  # DeepSpeed's layer wants as many experts on every rank


@pytest.mark.slow
@pytest.mark.jobs
def test_joint_training_is_measured_in_every_way_and_checked(tmp_path):
    from glider_dist.bench import joint

    base = save_tiny_base(tmp_path / "base", tiny_causal())
    rows = joint.run(tmp_path, 2, str(base))
    assert len(rows) == 8
    by = {(row["way"], row["dispatch"]): row for row in rows}
    one, replicated = by["one process, all experts", "-"], by["replicated experts, ZeRO 2", "-"]
    shared = by["ZeRO 2", "all_to_all"]
    assert one["dispatch MB/rank"] == replicated["dispatch MB/rank"] == 0
    assert shared["dispatch MB/rank"] > 0
    # Experts halve, gates stay.
    assert one["experts MB"] / 2 < shared["experts MB"] < 0.6 * one["experts MB"]
    assert by["ZeRO 3", "auto"]["base MB"] < 0.6 * one["base MB"]
    assert json.loads((tmp_path / "bench_joint.json").read_text())["ranks"] == 2
