"""A lock on a file that lives as long as its process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

from glider_dist.errors import GliderError

log = logging.getLogger(__name__)


def locked(path: Path, what: str, advice: str) -> int:
    """Open and lock a file, which is made if need be, and note in it who holds it.

    The lock ends with its process, however that ends. The holder deletes the file before it closes the handle.

    Args:
        what: that the lock is for, to begin a message with.

    Returns:
        The handle.

    Raises:
        GliderError: another process holds the lock, or the file cannot be opened.
    """
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            more = "; raise the limit of open files (ulimit -n)" if error.errno == errno.EMFILE else ""
            raise GliderError(f"{what} cannot be locked: {path}: {error.strerror}{more}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                owner = os.read(handle, 1000).decode(errors="replace")
                os.close(handle)
                raise GliderError(
                    f"{what} is being written by another job ({owner or 'which has just begun'}); {advice}"
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
