"""How a run is doing: ``run_dir/state.json``, for whoever looks in from outside.

    {"stage", "state": "running" | "done" | "stopped" | "failed", "reason"?, "started", "updated", "progress"?}

A run that says it is running is, as long as its process holds the lock on ``run_dir/.running``; the lock ends with
the process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from glider_dist.errors import GliderError
from glider_dist.file_lock import is_held, locked, unlock

STATE, LOCK = "state.json", ".running"
IN_USE = "wait for it, end it, or set another run_dir"
_SECONDS = 5.0
_SILENT_S = 300.0
_mine: dict[Path, int] = {}
"""Locks of this process. A stage that broke off here may be started here again, in a notebook, say."""


def hold(run_dir: Path) -> None:
    """Lock a run directory for this process, until its run ends or :func:`release`.

    Raises:
        GliderError: another process has a run there.
    """
    file = run_dir.absolute() / LOCK
    if file not in _mine:
        _mine[file] = locked(file, f"run_dir {run_dir}", IN_USE)


def release(run_dir: Path) -> None:
    """Let the lock go, if this process holds it."""
    file = run_dir.absolute() / LOCK
    if file in _mine:
        unlock(_mine.pop(file), file)


class RunState:
    """Keeps the state of a run that has begun in this process. A full disk costs news, nothing else.

    Raises:
        GliderError: another process has a run there.
    """

    def __init__(self, run_dir: Path, stage: str):
        self._path = run_dir / STATE
        self._value: dict[str, Any] = {"stage": stage, "state": "running", "started": round(time.time(), 3)}
        hold(run_dir)
        self._ended = False
        self._write()

    def progress(self, what: str, done: int, total: int) -> None:
        """Note how far it is; written every few seconds."""
        first = "progress" not in self._value
        self._value["progress"] = {"what": what, "done": done, "total": total}
        if first or time.time() - self._value["updated"] >= _SECONDS:
            self._write()

    def end(self, state: str, reason: str = "") -> None:
        """Note how it ended. A second call does nothing."""
        if self._ended:
            return
        self._ended = True
        self._value |= {"state": state, "reason": reason}
        self._write()
        release(self._path.parent)

    def _write(self) -> None:
        self._value["updated"] = round(time.time(), 3)
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self._value, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError:
            temporary.unlink(missing_ok=True)


def check_free(run_dir: Path) -> None:
    """Raises GliderError if another process has a run there."""
    other = holder(run_dir)
    if other and run_dir.absolute() / LOCK not in _mine:
        raise GliderError(f"run_dir {run_dir} is being written by another job ({other}); {IN_USE}")


def gone(run_dir: Path, updated: float) -> str:
    """Why a run that says it is running is not, in words; "" if it is.

    Some file systems (Lustre with ``localflock``, BeeGFS) keep a node's locks from the others: a lock that is free
    here says nothing of a process elsewhere there, which counts as long as it was heard of lately.

    Args:
        updated: when its state was written, Unix seconds.
    """
    if holder(run_dir):
        return ""
    try:
        owner = (run_dir / LOCK).read_text(encoding="utf-8", errors="replace")
    except OSError:
        owner = ""
    if not owner or owner.endswith(f" on {socket.gethostname()}"):
        return "its process is gone"
    return "" if time.time() - updated < _SILENT_S else f"nothing is heard of {owner}"


def holder(run_dir: Path) -> str:
    """The living process that holds the run's lock, in words; "" if there is none."""
    try:
        # Other users may look, who cannot write there.
        handle = os.open(run_dir / LOCK, os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        # Where a file system has no locks, nobody can be told to hold one.
        return (os.read(handle, 1000).decode(errors="replace") or "a process") if is_held(error) else ""
    finally:
        os.close(handle)
    return ""
