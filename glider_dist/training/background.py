"""One thread that writes while the steps go on. What fails there is raised where the next step comes by."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from glider_dist.errors import GliderError


class Background:
    """Works off what it is given, in order; after a failure the rest is left undone."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "background")
        self._pending: list[Future[None]] = []
        self._failed = False

    @property
    def busy(self) -> bool:
        return any(not future.done() for future in self._pending)

    def submit(self, *work: Callable[[], Any]) -> None:
        """Wait for earlier work, which bounds the memory that it holds, then start this."""
        self.wait()
        self._pending = [self._thread.submit(self._run, each) for each in work]

    def _run(self, work: Callable[[], Any]) -> None:
        if self._failed:
            return
        try:
            work()
        except BaseException:
            self._failed = True
            raise

    def check(self) -> None:
        """Raise what has failed so far, once.

        Raises:
            GliderError: a file could not be written; the sentence names it.
        """
        while self._pending and self._pending[0].done():
            self._result(self._pending.pop(0))

    def wait(self) -> None:
        """Until all is done; raises as :meth:`check` does."""
        while self._pending:
            self._result(self._pending.pop(0))

    def close(self) -> None:
        """Let what is under way end, and end the thread; raises nothing."""
        self._thread.shutdown(wait=True)

    @staticmethod
    def _result(future: Future[None]) -> None:
        try:
            future.result()
        except OSError as error:
            what = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
            raise GliderError(
                f"{error.filename} cannot be written ({error.strerror}); {what} and start the job again, it goes "
                "on from the files written before"
            ) from error
