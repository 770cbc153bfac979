"""A process among the job's processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the cores of a process are not known here")
@pytest.mark.parametrize(("chosen", "wanted"), [("3", 3), (None, len(os.sched_getaffinity(0)))])
def test_the_threads_a_user_asks_for_are_kept_and_else_every_core_has_one(chosen: str | None, wanted: int) -> None:
    script = "import torch\nfrom glider_dist.parallel.ranks import start_ranks\nstart_ranks('cpu')\n"
    script += "print(torch.get_num_threads())"
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "WORLD_SIZE")}
    if chosen:
        env["OMP_NUM_THREADS"] = chosen
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == wanted
