"""The small jobs of the fault campaign: where they run, how they are launched, and what they leave."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_jobs import (
    HELD_IN,
    adapters,
    describe_and_index,
    free_port,
    largest_difference,
    settings,
    write_tasks,
)

from glider_dist.errors import EXIT_STOPPED
from glider_dist.testing import random_pool, tiny_causal

JOBS = ("experts", "gates", "evaluation", "served", "joint")
ANSWERS = ("evaluation", "served")
"""Jobs that make answers, the others make tensors."""
GRACE_S = 20.0


def words_of(job: str, folder: Path, base: Path, service: str) -> list[str]:
    """The command of a job; ``service`` is the address of the embeddings of one that is served."""
    stages = {"experts": "train-experts", "gates": "train-gates", "joint": "train-joint"}
    stage = stages.get(job, "evaluate")
    changes: dict[str, Any] = {
        "train__max_steps": 24, "train__gate_steps": 24, "train__eval_every": 8, "train__save_steps": 2,
        "evaluate__routers": "[base,merged,phatgoose]", "evaluate__batch_size": 4, "evaluate__save_minutes": 1e-3,
    }  # fmt: skip
    if job == "served":
        changes |= {"evaluate__routers": "[phatgoose,glider]", "service__url": service}
    if job == "joint":
        changes |= {"router__kind": "phatgoose", "zero_stage": 1, "train__learning_rate": 1e-3}
    return [stage, *settings(folder, base=base, **changes)]


def _rank(words: Sequence[str], env: dict[str, str], output: str) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(env)
    from glider_dist.cli import main

    sys.argv = ["glider-dist", *words]
    code = 1
    try:
        code = main(list(words))
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Launch:
    """The ranks of one start. If one ends badly the others are asked to end, then killed, as launchers do."""

    def __init__(self, words: Sequence[str], ranks: int, output: Path):
        context = multiprocessing.get_context("forkserver")
        port = str(free_port())
        self.processes = []
        for rank in range(ranks):
            env = {
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "GLIDER_DIST_CACHE": str(output.parent / "cache"),
            }
            if ranks > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(ranks)}
            process = context.Process(target=_rank, args=(words, env, str(output)))
            process.start()
            self.processes.append(process)
        self.started = time.monotonic()

    def send(self, number: int, ranks: Sequence[int]) -> bool:
        """Whether any of them was still there."""
        alive = [self.processes[rank] for rank in ranks if self.processes[rank].is_alive()]
        for process in alive:
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        return bool(alive)

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, timeout: float = 300.0) -> int:
        """The code of a stop if any rank gave it, else that of the first rank that ended badly, or 0."""
        everyone = range(len(self.processes))
        asked, end = 0.0, time.monotonic() + timeout
        first = 0
        while self.running and time.monotonic() < end:
            first = first or next((process.exitcode for process in self.processes if process.exitcode), 0)
            if not asked and first:
                asked = time.monotonic()
                self.send(signal.SIGTERM, everyone)
            if asked and time.monotonic() - asked > GRACE_S:
                break
            time.sleep(0.02)
        if self.running:
            self.send(signal.SIGKILL, everyone)
        for process in self.processes:
            process.join()
        codes = [process.exitcode or 0 for process in self.processes]
        return EXIT_STOPPED if EXIT_STOPPED in codes else first or next((code for code in codes if code), 0)


@dataclass
class Place:
    """Where one job runs: its folder, and a small disk for what is to run full."""

    folder: Path
    job: str
    words: list[str]
    small: bool


def prepare(template: Path, folder: Path, job: str, base: Path, service: str, small: bool) -> Place:
    """A fresh copy of a job; ``small`` mounts a small file system at its run directory."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    run_dir = folder / "run"
    run_dir.mkdir(exist_ok=True)
    if small:
        mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(run_dir)]
        small = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    return Place(folder, job, words_of(job, folder, base, service), small)


def clean(place: Place) -> None:
    if place.small:
        subprocess.run(["umount", "-l", str(place.folder / "run")], check=False)
    shutil.rmtree(place.folder, ignore_errors=True)


def result_of(place: Place) -> Any:
    """What the job made: tensors by expert, or answers by router."""
    if place.job not in ANSWERS:
        return adapters(place.folder / "pool")
    rows = {path.stem: json.loads(path.read_text()) for path in sorted((place.folder / "run/rows").glob("*.json"))}
    return {name: [row["result"]["queries"], row["routing"]["tokens_per_expert"]] for name, row in rows.items()}


def difference(job: str, one: Any, other: Any) -> float:
    if job in ANSWERS:
        return 0.0 if one == other else 1.0
    return largest_difference(one, other) if one.keys() == other.keys() else float("inf")


def template(folder: Path, job: str) -> Path:
    if not folder.exists():
        write_tasks(folder / "tasks")
        if job != "experts":
            pool = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN, gates=job != "gates")
            describe_and_index(pool)
    return folder


def reference(root: Path, template: Path, job: str, ranks: int, base: Path, service: str) -> tuple[Any, float]:
    """The result of a job without a fault, and the seconds that it takes."""
    place = prepare(template, root / "job", job, base, service, False)
    try:
        launch = Launch(place.words, ranks, root / "job" / "output.txt")
        code = launch.wait()
        if code:
            raise SystemExit(f"{job} on {ranks}: exit code {code}\n{(root / 'job/output.txt').read_text()}")
        return result_of(place), time.monotonic() - launch.started
    finally:
        clean(place)
