"""One writer per expert: two jobs may fill one pool side by side, but not train the same expert into it.

The lock belongs to the open file and dies with its process, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from glider_dist.errors import GliderError
from glider_dist.pool.files import clear_up
from glider_dist.pool.names import check_name

log = logging.getLogger(__name__)


@contextmanager
def holding(pool: Path, name: str) -> Iterator[None]:
    """Hold an expert's lock, first clearing up after a process that was killed while it did.

    Raises:
        GliderError: another process holds it; the sentence says which.
    """
    path = pool / "experts" / f".{check_name(name)}.lock"
    handle = _locked(path, f"expert {name!r} of pool {pool}")
    try:
        clear_up(pool / "experts" / name)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def hold_all(pool: Path, names: Sequence[str]) -> ExitStack:
    """Hold the locks of several experts until the returned stack is closed; all of them or none."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(holding(pool, name))
        return stack.pop_all()


def _locked(path: Path, what: str) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                owner = os.read(handle, 1000).decode(errors="replace")
                os.close(handle)
                raise GliderError(
                    f"{what} is being written by another job ({owner or 'which has just begun'}); "
                    "wait for it, end it, or choose another pool"
                ) from None
            # A file system without locks: nothing can be told, so nothing is refused.
            log.debug("%s cannot be locked (%s)", path, error)
            return handle
        if _same_file(handle, path):
            os.ftruncate(handle, 0)
            with contextlib.suppress(OSError):  # on a full disk it locks as well
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle
        os.close(handle)  # its holder has just deleted it


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
