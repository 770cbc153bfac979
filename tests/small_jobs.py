"""Small jobs for tests of the command line: a tiny base, a folder of tasks, and launchers that end in time."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from glider_dist.cli import main
from glider_dist.pool import ExpertPool
from glider_dist.semantics.embedder import PACKAGED, Embedder
from glider_dist.semantics.index import FILE, Index, save_index, texts_digest

HELD_IN = ("copy", "upper", "last")
HELD_OUT = ("first",)
ERROR = "glider-dist: error: "

_SCRATCH = tempfile.TemporaryDirectory(prefix="glider-dist-tests-")

_TASKS = {
    "copy": ("Repeat the words as they are", lambda words: " ".join(words)),
    "upper": ("Write the words in capital letters", lambda words: " ".join(words).upper()),
    "last": ("Give the last word of the line", lambda words: words[-1]),
    "first": ("Give the first word of the line", lambda words: words[0]),
}
_WORDS = ("sun", "river", "stone", "cloud", "tree", "lamp", "door", "bird", "fish", "wind", "sand")


def write_tasks(folder: Path, held_in: Sequence[str] = HELD_IN, held_out: Sequence[str] = HELD_OUT) -> Path:
    """A folder for tasks.source=jsonl: 12 training, 6 validation and 4 test examples (held-out: these alone)."""
    records, wordings = [], {}
    for name in (*held_in, *held_out):
        definition, answer = _TASKS[name]
        split = "held_in" if name in held_in else "held_out"
        records.append({"name": name, "definition": definition + ".", "split": split})
        wordings[name] = {
            "expert_descriptions": [f"{definition}, in order.", f"This expert can: {definition.lower()}."],
            "query_instructions": [f"{lead}{definition.lower()}." for lead in ("Please ", "Now ", "Kindly ", "")],
        }
        (folder / "tasks" / name).mkdir(parents=True)
        for part, count in (("train", 12), ("validation", 6), ("test", 4)):
            if part != "test" and name in held_out:
                continue
            rows = []
            for row in range(count):
                start = int(hashlib.sha256(f"{part}{row}".encode()).hexdigest(), 16) % 1000
                words = [_WORDS[(start * (place + 1) + row) % len(_WORDS)] for place in range(2 + row % 3)]
                rows.append({"id": f"{name}-{part}-{row}", "input": " ".join(words), "target": answer(words)})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "tasks" / name / f"{part}.jsonl").write_text(text)
    (folder / "tasks.json").write_text(json.dumps({"tasks": records}))
    (folder / "instructions.json").write_text(json.dumps(wordings))
    return folder


def settings(folder: Path, **changes: Any) -> list[str]:
    """``key=value`` of a job of seconds, its tasks, pool and run in ``folder``; ``a__b`` stands for ``a.b``."""
    values = {
        "pool": folder / "pool",
        "run_dir": folder / "run",
        "device": "cpu",
        "dtype": "float32",
        "tracking": "off",
        "tasks__source": "jsonl",
        "tasks__path": folder / "tasks",
        "tasks__max_length": 128,
        "lora__rank": 4,
        "lora__alpha": 8,
        # The same bits on any number of ranks: replicas would sum their parts of a step.
        "train__replicas": 1,
        "train__max_steps": 6,
        "train__batch_size": 4,
        "train__gate_steps": 4,
        "train__eval_every": 3,
        "train__eval_examples": 4,
        "calibrate__queries": 2,
        "calibrate__alphas": "[1,10]",
        "evaluate__queries": 4,
        "evaluate__batch_size": 8,
        "evaluate__max_new_tokens": 4,
        "evaluate__bootstrap": 50,
        **changes,
    }
    return [f"{key.replace('__', '.')}={value}" for key, value in values.items()]


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line[len(ERROR) :] for line in self.err.splitlines() if line.startswith(ERROR)]


def command(*arguments: str) -> Outcome:
    """Run ``glider-dist`` in this process, and undo what it sets for its process."""
    root = logging.getLogger()
    handlers, level, variables, threads = root.handlers[:], root.level, dict(os.environ), torch.get_num_threads()
    os.environ["GLIDER_DIST_CACHE"] = _SCRATCH.name
    os.environ.pop("OMP_NUM_THREADS", None)  # as many threads as cores, see ``cores``
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(arguments))
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        os.environ.clear()
        os.environ.update(variables)
        torch.set_num_threads(threads)
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def cores(count: int) -> Iterator[None]:
    """Run on so many cores only, so that every rank computes with one thread: the last bits of a matrix product
    depend on the number of threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def environment(**changes: str) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    fixed = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": f"{_SCRATCH.name}/torch_extensions",
        "GLIDER_DIST_CACHE": _SCRATCH.name,
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "PYTHONUNBUFFERED": "1",
    }
    return {**env, **fixed, **changes}


def start(arguments: Sequence[str], folder: Path, **env: str) -> subprocess.Popen[str]:
    """Start a command in ``folder``, on as many cores as this process may use."""
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def finish(process: subprocess.Popen[str], timeout: float = 180.0) -> Outcome:
    """Wait for a process; past the time it is killed with its ranks and the test fails with its output."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        pytest.fail(f"{process.args} was still running after {timeout} s\n{out}\n{err}")
    return Outcome(process.returncode, out, err)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and all below it; launchers give each rank a process group of its own."""
    parent = psutil.Process(process.pid)
    for each in [parent, *parent.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def program(name: str) -> str:
    """An executable of this Python's environment."""
    return str(Path(sys.executable).parent / name)


def launch(folder: Path, ranks: int, arguments: Sequence[str], launcher: str = "torchrun") -> Outcome:
    """Run ``glider_dist`` on so many ranks under ``torchrun`` or ``deepspeed``, one thread each."""
    port = str(free_port())
    if launcher == "torchrun":
        words = [program(launcher), "--nproc_per_node", str(ranks), "--master_port", port, "-m", "glider_dist"]
    else:
        words = [program(launcher), "--num_gpus", str(ranks), "--master_port", port, "--module", "glider_dist"]
    with cores(ranks):
        process = start([*words, *arguments], folder)
    return finish(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and hash of every file below a folder, and of every empty folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        if path.is_file() or not any(path.iterdir()):
            stamp = path.stat().st_mtime_ns if path.is_file() else 0
            found[str(path.relative_to(folder))] = (stamp, hashlib.sha256(content).hexdigest())
    return found


def adapters(pool: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The adapter's and the gate's tensors of every expert."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in ExpertPool.open(pool).names:
        for file in ("adapter_model.safetensors", "gate.safetensors"):
            path = pool / "experts" / name / file
            if path.exists():
                found.setdefault(name, {}).update(load_file(path))
    return found


def largest_difference(a: Mapping[str, Mapping[str, torch.Tensor]], b: Mapping[str, Any]) -> float:
    """The largest ``|a - b| / max|a|`` over all tensors of all experts; both must have the same ones."""
    assert a.keys() == b.keys()
    worst = 0.0
    for name, tensors in a.items():
        assert tensors.keys() == b[name].keys()
        for key, value in tensors.items():
            scale = float(value.abs().max()) or 1.0
            worst = max(worst, float((value - b[name][key]).abs().max()) / scale)
    return worst


def share_within(tolerance: float, a: Mapping[str, Mapping[str, torch.Tensor]], b: Mapping[str, Any]) -> float:
    """The share of all values with ``|a - b| <= tolerance * max|a|`` of their tensor."""
    close = [
        (value - b[name][key]).abs().flatten() <= tolerance * value.abs().max()
        for name, tensors in a.items()
        for key, value in tensors.items()
    ]
    return float(torch.cat(close).float().mean())


def describe_and_index(pool: ExpertPool, width: int = 384, embedder: str = "all-minilm-l6-v2") -> None:
    """Give every expert a description and the pool an index of random embeddings, which it takes for the packaged
    embedder's."""
    for expert in pool.experts():
        expert.update_card(descriptions=[f"This expert is called {expert.name}."])
    texts = {expert.name: expert.card()["descriptions"] for expert in pool.experts()}
    vectors = torch.randn(len(texts), width, generator=torch.Generator().manual_seed(0))
    owner = torch.arange(len(texts))
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    index = Index(tuple(texts), vectors, owner, embedder, texts_digest(texts), packaged_fingerprint())
    save_index(index, pool.router_dir / FILE)


@cache
def packaged_fingerprint() -> str:
    return Embedder(PACKAGED).fingerprint()
