"""A job's own embedding service: all ranks use it, and it ends with the job, however the job ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from small_jobs import (
    command,
    cores,
    environment,
    finish,
    free_port,
    launch,
    program,
    settings,
    start,
    write_tasks,
)

from glider_dist.pool import ExpertPool
from glider_dist.semantics.index import read_index
from glider_dist.testing import random_pool, save_tiny_base, tiny_causal

pytestmark = pytest.mark.jobs

# A job that starts its service, embeds, prints the service's process id and waits to be ended.
_JOB = """
import os, signal, sys, time
# A background job of a shell starts with this signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from glider_dist.config import Config
from glider_dist.parallel.ranks import ALONE
from glider_dist.semantics.source import EmbedderSource
cfg = Config()
cfg.service.url, cfg.service.cache = "auto", "off"
source = EmbedderSource(cfg, ALONE)
assert source.embed(["hello", "world"]).shape == (2, 384)
print(source._own.pid, flush=True)
how = sys.argv[1]
if how == "return": sys.exit(0)
if how == "close": source.close(); time.sleep(100)
if how == "raise": raise RuntimeError("a bug")
if how == "exit": os._exit(3)
if how == "fork":
    # A forked worker holds the job's end of the pipe and outlives it.
    if os.fork() == 0: os.close(1); os.close(2); time.sleep(20); os._exit(0)
time.sleep(100)
"""

# A rank of two that embeds with the job's own service and prints the address it has of it.
_RANK = """
import os, socket, sys
# Two hosts on one machine.
if sys.argv[2] == "two": socket.gethostname = lambda: "host-" + os.environ["RANK"]
import psutil
from glider_dist.config import Config
from glider_dist.parallel.ranks import start_ranks
from glider_dist.semantics.source import EmbedderSource
cfg = Config()
cfg.service.url, cfg.service.host, cfg.service.cache, cfg.service.fallback = "auto", sys.argv[1], "off", False
ranks = start_ranks("cpu")
source = EmbedderSource(cfg, ranks)
assert source.embed(["hello", "world"]).shape == (2, 384)
if ranks.is_main:
    sockets = psutil.Process(source._own.pid).net_connections()
    assert [each.laddr.ip for each in sockets if each.status == "LISTEN"] == [sys.argv[1]]
print(source._remote._http.base_url.host)
ranks.gather(None)
source.close()
"""


def gone(pid: int, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("how", "number"),
    [
        pytest.param("return", None, marks=pytest.mark.slow),
        pytest.param("raise", None, marks=pytest.mark.slow),
        pytest.param("exit", None, marks=pytest.mark.slow),
        pytest.param("close", signal.SIGKILL, marks=pytest.mark.slow),
        ("wait", signal.SIGKILL),
        pytest.param("wait", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("wait", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("wait", signal.SIGSEGV, marks=pytest.mark.slow),
        ("fork", signal.SIGKILL),
    ],
)
def test_the_service_ends_with_its_job(tmp_path: Path, how: str, number: signal.Signals | None):
    job = start([sys.executable, "-c", _JOB, how], tmp_path, GLIDER_DIST_SERVICE_TOKEN="")
    try:
        assert job.stdout is not None
        line = job.stdout.readline()
        assert line.strip().isdigit(), job.stderr.read() if job.stderr else ""
        service = int(line)
        if how == "close":
            assert gone(service)
        if number is not None:
            assert how == "close" or psutil.pid_exists(service)
            job.send_signal(number)
        job.wait(60)
        assert gone(service)
    finally:
        if job.poll() is None:
            job.kill()
        job.communicate()


@pytest.mark.slow
def test_a_service_that_dies_is_started_again_at_the_same_address(tmp_path: Path):
    code = _JOB.replace(
        "how = sys.argv[1]",
        "import signal\n"
        "url, first = source._own.access.url, source._own.pid\n"
        "os.kill(first, signal.SIGKILL)\n"
        "assert source.embed(['a new text']).shape == (1, 384)\n"
        "assert source._own.pid != first and source._own.access.url == url\n"
        "assert source._remote._fallback is None\n"
        "how = 'return'",
    )
    done = finish(start([sys.executable, "-c", code], tmp_path))
    assert done.code == 0, done.err
    assert "started again" in done.err
    assert gone(int(done.out))


@pytest.mark.parametrize(
    ("host", "hosts", "reached_at"),
    [
        ("0.0.0.0", "two", "127.1"),
        pytest.param("0.0.0.0", "one", "127.0.0.1", marks=pytest.mark.slow),
    ],
)
def test_ranks_reach_a_service_that_listens_everywhere_where_they_met(
    tmp_path: Path, host: str, hosts: str, reached_at: str
):
    # 127.1 is an address of this machine that is not recognised as loopback. The proxy does not exist.
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.1"}
    job.update({"MASTER_PORT": str(free_port()), "HTTP_PROXY": f"http://127.0.0.1:{free_port()}", "NO_PROXY": ""})
    ranks = [start([sys.executable, "-c", _RANK, host, hosts], tmp_path, RANK=str(i), **job) for i in range(2)]
    for done in [finish(rank) for rank in ranks]:
        assert done.code == 0, done.err
        assert done.out.split() == [reached_at]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The words of stages over a random pool of the tasks' experts, each in a run directory of its own."""
    folder = tmp_path_factory.mktemp("auto")
    write_tasks(folder / "tasks")
    base = save_tiny_base(folder / "base", tiny_causal())
    random_pool(folder / "pool", tiny_causal(), ["copy", "upper", "last"], base=str(base))

    def words(stage: str, run: str, **changes: object) -> list[str]:
        return [stage, *settings(folder, base=base, run_dir=folder / run, **changes)]

    words.folder = folder  # type: ignore[attr-defined]
    for stage in ("describe", "index"):
        done = command(*words(stage, stage))
        assert done.code == 0, done.err
    return words


def services() -> set[int]:
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            # Other jobs of this machine have other caches.
            mine = process.environ().get("GLIDER_DIST_CACHE") == environment()["GLIDER_DIST_CACHE"]
            if mine and "serve-embeddings" in process.cmdline():
                found.add(process.pid)
    return found


def answers(run: Path) -> str:
    """What was answered, without times."""
    value = json.loads((run / "rows" / "glider.json").read_text())
    return json.dumps([[q["id"], q["prediction"], q["own_first"]] for q in value["result"]["queries"]])


def test_all_ranks_of_an_evaluation_share_one_service_and_nothing_of_it_is_recorded(
    job: Callable[..., list[str]],
):
    folder: Path = job.folder  # type: ignore[attr-defined]
    before = services()
    with cores(1):
        alone = command(*job("evaluate", "alone", evaluate__routers="[glider]"))
    assert alone.code == 0, alone.err
    shared = launch(folder, 2, job("evaluate", "shared", evaluate__routers="[glider]", service__url="auto"))
    assert shared.code == 0, shared.err
    assert "is ready" in shared.err
    assert "this process embeds" not in shared.err
    assert answers(folder / "alone") == answers(folder / "shared")
    assert all(gone(pid) for pid in services() - before)
    recorded = "".join(
        path.read_text(errors="replace") for path in (folder / "shared").rglob("*") if path.is_file()
    )
    assert "Bearer" not in recorded + shared.err
    assert "http://127.0.0.1" not in recorded + shared.err + shared.out


@pytest.mark.slow
def test_a_service_killed_in_an_evaluation_loses_no_query_and_changes_no_result(job: Callable[..., list[str]]):
    folder: Path = job.folder  # type: ignore[attr-defined]
    before = services()
    words = job("evaluate", "struck", evaluate__routers="[glider]", service__url="auto", evaluate__batch_size=2)
    torchrun = [program("torchrun"), "--nproc_per_node", "2", "--standalone", "-m", "glider_dist"]
    process = start([*torchrun, *words], folder)
    killed: set[int] = set()

    def strike() -> None:
        """Kill the service twice, as soon as it listens: the queries wait for it then."""
        while process.poll() is None and len(killed) < 2:
            for pid in services() - before - killed:
                with contextlib.suppress(psutil.Error):
                    if psutil.Process(pid).net_connections():
                        psutil.Process(pid).kill()
                        killed.add(pid)
            time.sleep(0.05)

    striking = threading.Thread(target=strike)
    striking.start()
    done = finish(process, 400)
    striking.join()
    assert done.code == 0, done.err
    assert len(killed) == 2
    assert "started again" in done.err
    assert answers(folder / "struck") == answers(folder / "alone")


@pytest.mark.slow
def test_an_index_made_with_the_service_is_the_same(job: Callable[..., list[str]]):
    folder: Path = job.folder  # type: ignore[attr-defined]
    pool = ExpertPool.open(folder / "pool")
    path = pool.router_dir / "embeddings.safetensors"
    before = read_index(path)
    path.unlink()
    done = finish(
        start([sys.executable, "-m", "glider_dist", *job("index", "again", service__url="auto")], folder)
    )
    assert done.code == 0, done.err
    after = read_index(path)
    assert (after.fingerprint, after.texts) == (before.fingerprint, before.texts)
    assert float((after.embeddings - before.embeddings).abs().max()) < 1e-5


@pytest.mark.slow
def test_a_launcher_killed_with_its_ranks_leaves_no_service(job: Callable[..., list[str]]):
    folder: Path = job.folder  # type: ignore[attr-defined]
    before = services()
    words = job("evaluate", "killed", evaluate__routers="[glider]", service__url="auto")
    torchrun = [program("torchrun"), "--nproc_per_node", "2", "--standalone"]
    process = subprocess.Popen(
        [*torchrun, "-m", "glider_dist", *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not services() - before and time.monotonic() < deadline:
            time.sleep(0.05)
        mine = services() - before
        assert mine
        for child in psutil.Process(process.pid).children(recursive=True):
            if child.pid not in mine:
                with contextlib.suppress(psutil.NoSuchProcess):
                    os.kill(child.pid, signal.SIGKILL)
        process.kill()
        assert all(gone(pid) for pid in mine)
    finally:
        process.kill()
        process.wait()
