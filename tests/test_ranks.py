"""A process among the job's processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_jobs import free_port

IMPATIENT = """from datetime import timedelta
from glider_dist.parallel import ranks
from glider_dist.parallel.ranks import start_ranks
ranks._TENSOR_PATIENCE = timedelta(seconds=2)
"""


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
    script += f"{IMPATIENT}try:\n    start_ranks('cpu')\nexcept GliderError as error:\n    print(error)"
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


def test_ranks_wait_longer_for_each_other_than_for_a_tensor() -> None:
    script = "import sys, time, torch, torch.distributed as dist\n"
    script += f"{IMPATIENT}ranks = start_ranks('cpu')\n"
    script += "time.sleep(4 * ranks.rank)\n"
    script += "print(ranks.gather(ranks.rank))\n"
    script += "time.sleep(4 * ranks.rank)\n"
    script += "dist.all_reduce(torch.ones(1))"
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **job, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    found = [process.communicate(timeout=60) for process in processes]
    assert [out.strip() for out, _ in found] == ["[0, 1]", "[0, 1]"]
    assert "imed out" in found[0][1]
    assert processes[0].returncode != 0


def test_a_process_may_open_as_many_files_as_its_hard_limit_allows(tmp_path: Path) -> None:
    """More locks than the soft limit, and one sentence where the hard one is reached."""
    (tmp_path / "experts").mkdir()
    script = "import resource, sys\n"
    script += "from pathlib import Path\n"
    script += "from glider_dist.errors import GliderError\n"
    script += "from glider_dist.parallel.ranks import start_ranks\n"
    script += "from glider_dist.pool.lock import hold_all\n"
    script += "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 400))\n"
    script += "start_ranks('cpu')\n"
    script += "hold_all(Path(sys.argv[1]), [f'e{i}' for i in range(200)]).close()\n"
    script += "try:\n    hold_all(Path(sys.argv[1]), [f'e{i}' for i in range(500)])\n"
    script += "except GliderError as error:\n    print(error)"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    (sentence,) = done.stdout.splitlines()
    assert sentence.endswith("raise the limit of open files (ulimit -n)")
    assert list((tmp_path / "experts").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc keeps memory for us")
def test_memory_freed_on_a_cpu_is_used_again_without_new_page_faults_however_much_it_is() -> None:
    script = """import resource, torch
from glider_dist.parallel.ranks import start_ranks
start_ranks("cpu")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(5 << 20) for _ in range(120)]  # 20 MB each, 2.5 GB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults())"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert first > 500_000  # pages of 4 KiB
    assert second < first / 20
