"""A lock on a file that lives as long as its process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from glider_dist.errors import GliderError

log = logging.getLogger(__name__)

# Somebody who only looks holds the lock for a moment.
_PATIENCE_S = 1.0
# A file server keeps the locks of a node that has died until its lease ends (NFS: 90 s).
_PATIENCE_WITH_NODES_S = 120.0


def locked(path: Path, what: str, advice: str) -> int:
    """Open and lock a file, which is made if need be, and note in it who holds it.

    The lock ends with its process, however that ends. A lock that another node holds is waited for as long as a
    file server keeps those of a node that has died.

    Args:
        what: that the lock is for, to begin a message with.

    Returns:
        The handle, for :func:`unlock`.

    Raises:
        GliderError: another process holds the lock, or the file cannot be opened.
    """
    here, started, told = socket.gethostname(), time.monotonic(), False
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            more = "; raise the limit of open files (ulimit -n)" if error.errno == errno.EMFILE else ""
            raise GliderError(f"{what} cannot be locked: {path}: {error.strerror}{more}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if is_held(error):
                owner = os.read(handle, 1000).decode(errors="replace")
                os.close(handle)
                elsewhere = bool(owner) and not owner.endswith(f" on {here}")
                if time.monotonic() - started < (_PATIENCE_WITH_NODES_S if elsewhere else _PATIENCE_S):
                    if elsewhere and not told:
                        log.warning("%s is held by %s; waiting, in case that node has died", what, owner)
                        told = True
                    time.sleep(0.1)
                    continue
                raise GliderError(
                    f"{what} is being written by another job ({owner or 'which has just begun'}); {advice}"
                ) from None
            if error.errno == errno.ESTALE:  # NFS: its holder, on another node, has just deleted it
                os.close(handle)
                continue
            # A file system without locks: nothing can be told, so nothing is refused.
            log.debug("%s cannot be locked (%s)", path, error)
            return handle
        if _same_file(handle, path):
            os.ftruncate(handle, 0)
            with contextlib.suppress(OSError):  # on a full disk it locks as well
                os.write(handle, f"process {os.getpid()} on {here}".encode())
            return handle
        os.close(handle)  # its holder has just deleted it


def unlock(handle: int, path: Path) -> None:
    """Delete the file, unless another one has taken its place, and let the lock go."""
    if _same_file(handle, path):
        path.unlink(missing_ok=True)
    os.close(handle)


def is_held(error: OSError) -> bool:
    """Whether ``flock`` has failed because another process holds the lock, not because there are no locks here."""
    return error.errno in (errno.EWOULDBLOCK, errno.EACCES)


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return False
