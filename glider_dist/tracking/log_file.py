"""The run's log.txt, which begins where the job begins although its folder is made later."""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path

_MOST = 10_000  # records kept of a job that opens no run directory


class EarlyLog(logging.handlers.MemoryHandler):
    """Keeps what is logged until :func:`open_log_file` writes it."""

    def __init__(self) -> None:
        super().__init__(_MOST, flushLevel=logging.CRITICAL + 1)

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.buffer) < _MOST:
            self.buffer.append(record)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk costs lines of the log, and not a traceback for each of them."""


def open_log_file(path: Path) -> logging.Handler:
    """Log to ``path`` from now on, after what an :class:`EarlyLog` of the root logger has kept.

    Raises:
        OSError: if the file cannot be opened.
    """
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for early in [known for known in root.handlers if isinstance(known, EarlyLog)]:
        early.setTarget(handler)
        early.flush()
        root.removeHandler(early)
        early.close()
    root.addHandler(handler)
    return handler
