"""The wish to stop: a signal to any rank, a time limit, or a file that a launcher makes. All ranks heed it.

A rank that leaves alone hangs the others, so a wish spreads through the key-value store of the launch, and a stage
acts on it in two steps: each rank breaks off its loop at a boundary of its own (:attr:`StopWish.wished`), keeps
what it has done, and then all together find out whether any of them did (:meth:`StopWish.agree`).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from glider_dist.errors import Stopped

if TYPE_CHECKING:  # torch takes seconds to load, and a signal may come before
    from glider_dist.parallel.ranks import Ranks

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOP_FILE = "GLIDER_DIST_STOP_FILE"
"""Environment variable: the path of a file that, once it is there, asks the ranks to stop."""
_KEY = "glider_dist/stop"
_LOOK_SECONDS = 0.2


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals so, then as before. Only the main thread can; elsewhere they stay what they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)


class StopWish:
    """Whether this job is to stop.

    Args:
        max_minutes: after which the job wishes it by itself; None: never.

    Attributes:
        ranks: this job's processes, once they have met; None: this one alone.
        watched: whether signals have been taken as wishes.
    """

    def __init__(self, max_minutes: float | None = None, ranks: Ranks | None = None):
        self.ranks = ranks
        self.watched = False
        self._limit = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._minutes = max_minutes
        self._reason = ""
        self._spread = False
        self._looked = -_LOOK_SECONDS
        self._file = os.environ.get(STOP_FILE)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take the signals as wishes (see :func:`signals_to`)."""
        with signals_to(self._on_signal):
            self.watched = True
            yield

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name

    @property
    def wished(self) -> bool:
        """What this rank knows now; ask at every boundary at which it could stop. Costs nothing much: others are
        asked a few times a second."""
        now = time.monotonic()
        if not self._reason and self._limit is not None and now >= self._limit:
            self._reason = f"max_minutes={self._minutes:g} have passed"
        if not self._reason and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._reason = self._from_others()
        if self._reason and not self._spread:
            self._spread = True
            log.info("%s: stopping after this step", self._reason)
            self._tell_others()
        return bool(self._reason)

    def agree(self, broke_off: bool) -> None:
        """All ranks call it after a loop that each may have broken off, with what it has done already kept.

        Raises:
            Stopped: on every rank, if any of them has broken off.
        """
        reason = self._reason if broke_off else ""
        if found := [reason for reason in (self.ranks.gather(reason) if self.ranks else [reason]) if reason]:
            raise Stopped(found[0])

    def _from_others(self) -> str:
        if self._file and os.path.exists(self._file):
            return "the launcher was asked to"
        return self.ranks.word_left(_KEY) if self.ranks else ""

    def _tell_others(self) -> None:
        if self.ranks:
            self.ranks.leave_word(_KEY, self._reason)
