"""One writer per expert: two jobs may fill one pool side by side, but not train the same expert into it.

The lock belongs to the open file and dies with its process, however it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from glider_dist.file_lock import locked, unlock
from glider_dist.pool.files import clear_up
from glider_dist.pool.names import check_name


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
    handle = locked(path, what, "wait for it, end it, or choose another pool")
    try:
        yield
    finally:
        unlock(handle, path)


def hold_all(pool: Path, names: Sequence[str]) -> ExitStack:
    """Hold the locks of experts until the returned stack is closed; all of them or none.

    Clears up first after a process that was killed while it held some of them.

    Raises:
        GliderError: another process holds one, and the sentence says which; or they are more files than this
            process may open.
    """
    with ExitStack() as stack:
        for name in dict.fromkeys(names):
            stack.enter_context(_holding(*_of_expert(pool, name)))
        if names:
            clear_up(pool / "experts", set(names))
        return stack.pop_all()
