"""The stage ``average-activations`` on several ranks, and over a base that ZeRO 3 shards."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_jobs import command, cores, launch, settings, snapshot, write_tasks

from glider_dist.model.stored import ACTIVATION_FILE
from glider_dist.pool import ExpertPool
from glider_dist.testing import random_pool, save_tiny_base, tiny_causal, tiny_seq2seq

pytestmark = [
    pytest.mark.jobs,
    pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="ranks cannot be pinned to cores here"),
]
TASKS = ("copy", "upper", "last", "first")
MODELS = {"llama": tiny_causal, "t5": tiny_seq2seq}
STAGE = "average-activations"


def activations(pool: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {expert.name: load_file(expert.folder / ACTIVATION_FILE) for expert in ExpertPool.open(pool).experts()}


@pytest.fixture(params=MODELS)
def alone(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with four experts and their mean activations, made by one process."""
    folder = tmp_path / "alone"
    write_tasks(folder / "tasks", held_in=TASKS, held_out=())
    base = save_tiny_base(folder / "base", MODELS[request.param]())
    random_pool(folder / "pool", MODELS[request.param](), experts=TASKS, gates=False, base=str(base))
    shutil.copytree(folder, tmp_path / "ranks")
    with cores(1):
        outcome = command(STAGE, *settings(folder, base=base))
    assert outcome.code == 0, outcome.err
    return folder


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_three_ranks_write_what_one_process_writes_and_a_second_run_changes_nothing(
    zero_stage: int, alone: Path, tmp_path: Path
) -> None:
    """Four experts on three ranks: the others have to wait for rank 0, which has two."""
    folder = tmp_path / "ranks"
    words = [STAGE, *settings(folder, base=alone / "base", zero_stage=zero_stage)]
    outcome = launch(folder, 3, words)
    assert outcome.code == 0, outcome.err
    assert "4 of 4 experts need average activations" in outcome.err
    ours, theirs = activations(folder / "pool"), activations(alone / "pool")
    assert set(ours) == set(TASKS)
    for name, means in theirs.items():
        assert means.keys() == ours[name].keys()
        assert all(torch.equal(ours[name][site], value) for site, value in means.items())
        assert any(bool(value.any()) for value in means.values())
    assert not torch.equal(*(next(iter(ours[name].values())) for name in TASKS[:2]))
    if not zero_stage:
        before = snapshot(folder / "pool")
        assert "0 of 4 experts need" in launch(folder, 3, words).err
        assert snapshot(folder / "pool") == before
    listed = command("pool", "verify", str(folder / "pool"))
    assert listed.code == 0, listed.out
