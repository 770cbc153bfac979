"""``glider-dist quickstart``: the whole method in one launch, on a small model and procedural tasks.

Started by hand, it starts itself again under the ``deepspeed`` launcher; there it runs every stage in order over
one pool, with the base loaded once per rank. Every stage does only what is missing, so a second run is short.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from glider_dist.cli import Arguments, run_stage
from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.evaluation import calibrate, evaluate
from glider_dist.evaluation.predict import predict, show
from glider_dist.evaluation.queries import make_queries
from glider_dist.job import Job
from glider_dist.parallel.ranks import ALONE
from glider_dist.parallel.stopping import STOP_FILE, signals_to
from glider_dist.pool.files import digest_of, read_json, write_json
from glider_dist.semantics import describe, indexing
from glider_dist.settings import read_config
from glider_dist.tasks.procedural import QUICKSTART_HELD_IN, QUICKSTART_HELD_OUT
from glider_dist.tracking.state import check_free
from glider_dist.training.experts import train_experts, train_gates

log = logging.getLogger(__name__)

FINISHED = "quickstart.json"
DEFAULTS: dict[str, Any] = {
    "run_dir": "quickstart",
    "tasks.held_in": list(QUICKSTART_HELD_IN),
    "tasks.held_out": list(QUICKSTART_HELD_OUT),
    "lora.alpha": 16.0,
    "train.max_steps": 24,
    "train.gate_steps": 20,
    "train.gate_batch_size": 8,
    "train.learning_rate": 1e-3,
    "train.eval_every": 24,
    "train.eval_examples": 24,
    "calibrate.queries": 8,
    "calibrate.alphas": [1.0, 3.0, 10.0, 30.0, 100.0],
    "evaluate.queries": 24,
    "evaluate.max_new_tokens": 10,
}


def run(arguments: Arguments) -> int:
    """Launch the ranks, or, inside the launch, run the stages; returns the exit code."""
    launched = "RANK" in os.environ
    # A configuration file means what it says under every command; the quick settings are for the quick tasks.
    defaults = DEFAULTS if arguments.file is None else {"run_dir": DEFAULTS["run_dir"]}
    if any(item.startswith("tasks.source=") for item in arguments.overrides):
        # Other tasks have other names.
        defaults = {**defaults, "tasks.held_in": [], "tasks.held_out": []}
    cfg = read_config(arguments.file, arguments.overrides, defaults)
    if cfg.pool is None:
        cfg.pool = str(Path(str(cfg.run_dir)) / "pool")
    if launched:
        run_stage("quickstart", cfg, stages, arguments.text or "")
        return 0
    if arguments.fresh:
        _remove(Path(str(cfg.run_dir)))
    elif done := _finished(cfg, arguments.text or ""):
        print(f"{done}\n\nEverything was done already; --fresh starts over.")
        return 0
    return _launch(arguments, cfg)


def stages(job: Job, text: str = "") -> None:
    """Every stage in order, the table, and one answered query."""
    started = time.perf_counter()
    asked = text
    results: Any = None
    for name, stage in (
        ("train-experts", train_experts),
        ("train-gates", train_gates),
        ("describe", describe.run),
        ("index", indexing.run),
        ("calibrate", calibrate.run),
        ("evaluate", evaluate.run),
    ):
        before = time.perf_counter()
        results = stage(job)
        if job.ranks.is_main:
            log.info("%s took %.0f s", name, time.perf_counter() - before)
    if not text:
        query = make_queries(job.tasks.held_in[:1], "test", 1, job.collator, ())[0]
        text = f"{query.instruction} Input: {query.example.input}"
    prediction = predict(job, job.open_pool(), text)
    if job.ranks.is_main:
        minutes = (time.perf_counter() - started) / 60
        print(f"\n{show(text, prediction)}\n\nAll stages took {minutes:.1f} minutes. Ask your own:", flush=True)
        command = f"glider-dist predict 'INSTRUCTION Input: TEXT' pool={job.pool_path}"
        print(f"  {command}\nRun again: nothing is done twice. --fresh starts over.", flush=True)
        report = evaluate.report(job, results)
        write_json(
            job.run_dir / FINISHED, {"key": _key(job, asked), "text": f"{report}\n{show(text, prediction)}"}
        )


def _key(job: Job, text: str) -> str:
    """Everything the printed result depends on."""
    parts = [evaluate.rows_key(job, job.open_pool(check_base=False)), job.cfg.evaluate.routers, text]
    return digest_of(parts)


def _finished(cfg: Config, text: str) -> str | None:
    """What an earlier run printed, if nothing that it depends on has changed since."""
    record = Path(str(cfg.run_dir)) / FINISHED
    if not record.exists() or not (Path(str(cfg.pool)) / "pool.json").exists():
        return None
    stored = read_json(record)
    # As the ranks would, which answer on a GPU where there is one.
    alone = dataclasses.replace(ALONE, device=torch.device("cuda" if _gpus(cfg) else "cpu"))
    return str(stored["text"]) if stored["key"] == _key(Job(cfg, "quickstart", alone), text) else None


def _gpus(cfg: Config) -> int:
    return torch.cuda.device_count() if cfg.device != "cpu" and torch.cuda.is_available() else 0


def _remove(run_dir: Path) -> None:
    if not run_dir.exists():
        return
    if not (run_dir / "config.yaml").exists() and not (run_dir / "pool" / "pool.json").exists():
        raise GliderError(
            f"--fresh would delete {run_dir}, which does not look like a run directory; delete it yourself"
        )
    check_free(run_dir)
    shutil.rmtree(run_dir)


def _launch(arguments: Arguments, cfg: Config) -> int:
    gpus = _gpus(cfg)
    ranks = arguments.ranks or gpus or 2
    if gpus and ranks > gpus:
        raise GliderError(f"--ranks {ranks}, but this node has {gpus} GPUs; ask for fewer, or for device=cpu")
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(ranks),
        "--log_level",
        "warning",
    ]
    command += ["--master_port", str(_free_port()), "--module", "glider_dist", "quickstart"]
    command += [str(arguments.file)] if arguments.file else []
    command += arguments.overrides
    command += [arguments.text] if arguments.text else []
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not gpus:
        env.setdefault("DS_ACCELERATOR", "cpu")
    where = f"{gpus} GPUs found" if gpus else "no GPU found, so on the CPU with gloo"
    log.info("starting %d ranks under the deepspeed launcher (%s)", ranks, where)
    stop_file = Path(str(cfg.run_dir)) / f".stop.{os.getpid()}.{secrets.token_hex(4)}"
    return _run_stoppable(command, env, stop_file)


def _run_stoppable(command: list[str], env: dict[str, str], stop_file: Path) -> int:
    """Run the launcher; signals that ask to stop go to the ranks by a file, since it would die of them or kill the
    ranks."""

    def ask(number: int, frame: FrameType | None) -> None:
        stop_file.parent.mkdir(parents=True, exist_ok=True)
        stop_file.touch()

    with signals_to(ask):
        try:
            return subprocess.run(
                command, env={**env, STOP_FILE: str(stop_file.absolute())}, check=False
            ).returncode
        finally:
            stop_file.unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
