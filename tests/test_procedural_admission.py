"""The rule by which a procedural task is admitted, measured on the 135M model (about 25 minutes on 2 cores)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glider_dist.pool.files import read_json
from glider_dist.tasks.procedural import make_tasks

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.jobs]


@pytest.mark.timeout(5400)
def test_the_base_fails_every_task_and_an_expert_of_forty_steps_solves_it(tmp_path):
    names = [task.name for task in make_tasks(0, None)]
    common = [
        f"pool={tmp_path}/pool",
        f"run_dir={tmp_path}/run",
        f"tasks.held_in=[{','.join(names)}]",
        "lora.alpha=16",
        "train.max_steps=40",
        "train.learning_rate=1e-3",
        "train.eval_every=40",
        "train.eval_examples=16",
        "evaluate.routers=[base,oracle]",
        "evaluate.queries=24",
        "tracking=off",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for stage in ("train-experts", "evaluate"):
        subprocess.run([*launcher, "glider_dist", stage, *common], check=True, env=env, cwd=Path(tmp_path))
    routers = read_json(tmp_path / "run" / "results.json")["routers"]
    odd = {
        name: scores
        for name in names
        if (scores := {router: routers[router]["tasks"][name]["score"] for router in ("base", "oracle")})
        and (scores["base"] > 0.4 or scores["oracle"] < 0.8)
    }
    assert not odd
