"""A process among the job's processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the cores of a process are not known here")
@pytest.mark.parametrize(("chosen", "wanted"), [("1", 1), (None, len(os.sched_getaffinity(0)))])
def test_the_threads_a_user_asks_for_are_kept_and_else_every_core_has_one(chosen: str | None, wanted: int) -> None:
    script = "import torch\nfrom glider_dist.parallel.ranks import start_ranks\nstart_ranks('cpu')\n"
    script += "print(torch.get_num_threads())"
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "WORLD_SIZE")}
    if chosen:
        env["OMP_NUM_THREADS"] = chosen
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == wanted


@pytest.mark.parametrize(
    ("rank", "taken", "wanted"),
    [("0", True, "is in use"), ("1", False, "rank 1 of 2 did not meet the others at 127.0.0.1:")],
)
def test_ranks_that_cannot_meet_are_told_in_one_sentence(rank: str, taken: bool, wanted: str) -> None:
    script = "from glider_dist.errors import GliderError\n"
    script += "from glider_dist.parallel.ranks import start_ranks\n"
    script += "try:\n    start_ranks('cpu', 2 / 60)\nexcept GliderError as error:\n    print(error)"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = str(other.getsockname()[1])
        if taken:
            other.listen()
        job = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        env = {**os.environ, **job}
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    (sentence,) = done.stdout.splitlines()
    assert wanted in sentence
    assert port in sentence
