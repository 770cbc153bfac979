"""How a run is doing: ``run_dir/state.json``, for whoever looks in from outside.

    {"stage", "state": "running" | "done" | "stopped" | "failed", "reason"?, "started", "updated", "progress"?}

A run that says it is running is, as long as its process holds the lock on ``run_dir/.running``; the lock ends with
the process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

STATE, LOCK = "state.json", ".running"
_SECONDS = 5.0


class RunState:
    """Keeps the state of a run that has begun in this process. A full disk costs news, nothing else."""

    def __init__(self, run_dir: Path, stage: str):
        self._path = run_dir / STATE
        self._value: dict[str, Any] = {"stage": stage, "state": "running", "started": round(time.time(), 3)}
        self._lock = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:  # a file system without locks: the run will look as if it had been killed
            self._value["lock"] = str(error)
        self._write()

    def progress(self, what: str, done: int, total: int) -> None:
        """Note how far it is; written every few seconds."""
        first = "progress" not in self._value
        self._value["progress"] = {"what": what, "done": done, "total": total}
        if first or time.time() - self._value["updated"] >= _SECONDS:
            self._write()

    def end(self, state: str, reason: str = "") -> None:
        """Note how it ended. A second call does nothing."""
        if self._lock < 0:
            return
        self._value |= {"state": state, "reason": reason}
        self._write()
        self._path.with_name(LOCK).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = -1

    def _write(self) -> None:
        self._value["updated"] = round(time.time(), 3)
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self._value, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError:
            temporary.unlink(missing_ok=True)


def held(run_dir: Path) -> bool:
    """Whether a living process holds the run's lock."""
    try:
        handle = os.open(run_dir / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
