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
    with _holding(*_of_expert(pool, name)):
        clear_up(pool / "experts", [name])
        yield


@contextmanager
def holding_pool(pool: Path) -> Iterator[None]:
    """Hold a pool for a job whose result depends on all of its experts; single ones have their own locks besides.

    Raises:
        GliderError: another process holds it; the sentence says which.
    """
    with _holding(pool / ".lock", f"pool {pool}"):
        yield


def _of_expert(pool: Path, name: str) -> tuple[Path, str]:
    return pool / "experts" / f".{check_name(name)}.lock", f"expert {name!r} of pool {pool}"


@contextmanager
def _holding(path: Path, what: str) -> Iterator[None]:
    handle = _locked(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def hold_all(pool: Path, names: Sequence[str]) -> ExitStack:
    """Hold the locks of several experts until the returned stack is closed; all of them or none.

    Raises:
        GliderError: as :func:`holding`, or more than this process may open.
    """
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_holding(*_of_expert(pool, name)))
        if names:
            clear_up(pool / "experts", set(names))
        return stack.pop_all()


def _locked(path: Path, what: str) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            advice = "; raise the limit of open files (ulimit -n)" if error.errno == errno.EMFILE else ""
            raise GliderError(f"{what} cannot be locked: {path}: {error.strerror}{advice}") from None
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
