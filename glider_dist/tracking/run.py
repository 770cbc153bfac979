"""The run directory, which is the record of a run, and Weights & Biases, which shows it.

Everything W&B receives is in the run directory too: a run without W&B, or with a broken one, loses nothing.

    config.yaml     the resolved configuration of the latest start
    versions.json   versions, git commit, command line, start time, machine, device and dtype of the latest start
    metrics.jsonl   one object per log call, over all starts: {"time": Unix seconds, "step"?, values}
    log.txt         what the main rank logged, over all starts, from the beginning of the job
    NAME.json       tables: {"columns": [...], "rows": [[...]]}
    wandb_id        the W&B run that later starts continue; checkpoints name it, too
    state.json      how the latest start is doing (see ``tracking.state``)
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from omegaconf import OmegaConf

from glider_dist.errors import GliderError
from glider_dist.pool.files import replacing
from glider_dist.tracking.log_file import open_log_file
from glider_dist.tracking.state import RunState, hold
from glider_dist.tracking.versions import versions

logger = logging.getLogger(__name__)

METRICS, LOG, WANDB_ID = "metrics.jsonl", "log.txt", "wandb_id"
_MODES = ("offline", "online", "off")


class Run:
    """One run directory; stages of one process may share it. On ranks but the main one nothing is done."""

    def __init__(
        self,
        run_dir: Path,
        metrics: TextIO | None,
        handler: logging.Handler | None,
        wandb_run: Any,
        state: RunState | None = None,
    ):
        self.run_dir = run_dir
        self._state = state
        self._metrics = metrics
        self._handler = handler
        self._wandb = wandb_run

    @classmethod
    def start(
        cls,
        run_dir: Path,
        config: Mapping[str, Any],
        stage: str,
        mode: str,
        is_main: bool,
        compute: Mapping[str, Any] | None = None,
        wandb_id: Callable[[], str] = lambda: "",
    ) -> Run:
        """Create or continue ``run_dir``, write what describes this start, and open W&B unless mode is "off".

        Args:
            config: the resolved configuration as plain dicts and lists.
            stage: the W&B run's job type and, with the folder's name, its name, unless ``WANDB_JOB_TYPE`` and
                ``WANDB_NAME`` say others; ``WANDB_PROJECT``, ``WANDB_ENTITY`` and ``WANDB_RUN_GROUP`` count, too.
            mode: "offline" (records in run_dir/wandb, for ``wandb sync``), "online" or "off" (wandb is never
                imported; so does ``WANDB_MODE=disabled``). A W&B that cannot start costs a warning and no more; it
                never asks for a login.
            is_main: whether this is the rank that writes.
            compute: what the settings came to on this machine (device, dtype), for versions.json.
            wandb_id: tells which W&B run to continue if run_dir itself does not know; "": a new one.

        Raises:
            GliderError: if the mode is unknown or run_dir cannot be written.
        """
        if mode not in _MODES:
            raise GliderError(f"tracking is {mode!r}, but must be one of {', '.join(_MODES)}")
        if not is_main:
            return cls(run_dir, None, None, None)
        run_dir = run_dir.absolute()
        record = {**versions(), "compute": dict(compute or {})}
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            hold(run_dir)
            _replace(run_dir / "config.yaml", OmegaConf.to_yaml(dict(config)))
            _replace(run_dir / "versions.json", json.dumps(record, indent=1) + "\n")
            metrics = _open_to_append(run_dir / METRICS)
            handler = open_log_file(run_dir / LOG)
            state = RunState(run_dir, stage)
        except OSError as error:
            raise GliderError(_unwritable(run_dir, error.strerror)) from error
        return cls(run_dir, metrics, handler, _start_wandb(run_dir, config, stage, mode, wandb_id), state)

    def progress(self, what: str, done: int, total: int) -> None:
        """Note how far the stage is, for ``glider-dist runs``; cheap."""
        if self._state is not None:
            self._state.progress(what, done, total)

    def log(self, values: Mapping[str, float | str], step: int | None = None) -> None:
        """Record scalars and short strings. Steps may restart: stages that share a run count their own."""
        if self._metrics is None:
            return
        point = dict(values) if step is None else {**values, "step": step}
        record = {"time": round(time.time(), 3), **{key: _plain(value) for key, value in point.items()}}
        try:
            self._metrics.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._metrics.flush()
        except OSError as error:
            error.filename = str(self.run_dir / METRICS)
            raise
        # As a value and not as W&B's own step, which drops points that go back (a second stage, a restart).
        self._to_wandb(lambda run: run.log(point))

    def quantiles(self, name: str, values: Sequence[float], step: int | None = None) -> None:
        """Record min, p10, p50, p90 and max of ``values``, one per expert, say: five keys for any number."""
        if len(values) == 0:
            return
        points = np.quantile(np.asarray(values, dtype=np.float64), [0.0, 0.1, 0.5, 0.9, 1.0])
        keys = ("min", "p10", "p50", "p90", "max")
        self.log({f"{name}/{key}": float(point) for key, point in zip(keys, points, strict=True)}, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write ``run_dir/NAME.json`` (a slash in the name becomes an underscore) and a W&B table."""
        if self._metrics is None:
            return
        plain = [[_plain(value) for value in row] for row in rows]
        text = json.dumps({"columns": list(columns), "rows": plain}, ensure_ascii=False)
        _replace(self.run_dir / f"{name.replace('/', '_')}.json", text + "\n")

        def write(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=list(columns), data=plain, allow_mixed_types=True)})

        self._to_wandb(write)

    def finish(self, state: str = "done", reason: str = "") -> None:
        """Close files and W&B; online, wait 120 s at most for the upload. A second call does nothing.

        Args:
            state: how it ended: "done", "stopped" (which W&B calls preempted) or "failed".
        """
        if self._state is not None:
            self._state.end(state, reason)

        def finish(run: Any) -> None:
            run.summary.update({"state": state, "reason": reason})
            if state == "stopped":
                run.mark_preempting()
            run.finish(exit_code=int(state != "done"))

        self._to_wandb(finish)
        self._wandb = None
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            self._handler.close()
            self._handler = None

    def _to_wandb(self, write: Callable[[Any], object]) -> None:
        if self._wandb is None:
            return
        try:
            write(self._wandb)
        except Exception as error:  # whatever W&B's own process or network did, the job goes on
            self._wandb = None
            logger.warning("W&B stopped (%s); the run goes on and is recorded in %s", error, self.run_dir)
            if isinstance(error, ConnectionError):
                _forget_wandb()


def _forget_wandb() -> None:
    """W&B's process is gone: leave nothing that would ask for it when Python ends, and print a traceback."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()


def check_run_dir(run_dir: Path) -> None:
    """Raises GliderError if ``run_dir`` cannot be made or written, or another job is there.

    Writes nothing. A folder that is there is this process's from now on, until its run ends or ``release``.
    """
    there = run_dir.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise GliderError(_unwritable(run_dir, f"{there} is no folder"))
    for path in (there, run_dir / METRICS, run_dir / LOG):
        if os.path.lexists(path) and not os.access(path, os.W_OK | (os.X_OK if path == there else 0)):
            raise GliderError(_unwritable(run_dir, f"no permission to write {path}"))
    if run_dir.exists():
        hold(run_dir)


def _unwritable(run_dir: Path, reason: str | None) -> str:
    return f"run_dir {run_dir} cannot be written ({reason}); set another"


def known_wandb_id(run_dir: Path) -> str:
    """The W&B run that later starts continue; "" if there is none."""
    try:
        return (run_dir / WANDB_ID).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _start_wandb(
    run_dir: Path, config: Mapping[str, Any], stage: str, mode: str, elsewhere: Callable[[], str]
) -> Any:
    if mode == "off" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    try:
        import wandb

        # Silent before init: it also keeps wandb from asking for a login, on which a job would wait for ever.
        wandb.setup(settings=wandb.Settings(silent=True))
        wandb_id = known_wandb_id(run_dir) or elsewhere() or uuid.uuid4().hex[:8]
        run = wandb.init(
            dir=str(run_dir),
            project=os.environ.get("WANDB_PROJECT") or "glider_dist",
            name=os.environ.get("WANDB_NAME") or " ".join(dict.fromkeys((stage, run_dir.name))),
            job_type=os.environ.get("WANDB_JOB_TYPE") or stage,
            id=wandb_id,
            resume="allow",
            mode="online" if mode == "online" else "offline",
            config=dict(config),
            allow_val_change=True,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", init_timeout=30, finish_timeout=120),
        )
        run.define_metric("*", step_metric="step")
        _replace(run_dir / WANDB_ID, wandb_id + "\n")
    except Exception as error:  # not logged in, no network, broken install: tracking must not stop a job
        reason = " ".join(str(error).split())
        logger.warning("W&B did not start (%s); the run is recorded in %s only", reason, run_dir)
        return None
    logger.info(
        "W&B: %s",
        run.url if mode == "online" else f"offline; upload with `wandb sync {run_dir}/wandb/*run-*`",
    )
    return run


def _plain(value: Any) -> Any:
    """A JSON value; JSON has no NaN or infinity, so these become the strings "nan", "inf" and "-inf"."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else str(number)


def _open_to_append(path: Path) -> TextIO:
    """Open for appending; half a last line, left by a killed run, is cut off first."""
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)
    return open(path, "a", encoding="utf-8")


def _replace(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
