"""Locks on files: of run directories, experts and pools."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from glider_dist import file_lock
from glider_dist.errors import GliderError
from glider_dist.file_lock import locked, unlock
from glider_dist.tracking.run import check_run_dir
from glider_dist.tracking.state import LOCK, hold, holder, release


@contextmanager
def held(path: Path, how: int, owner: str, seconds: float) -> Iterator[None]:
    """Somebody else's lock, which ends after so many seconds."""
    path.write_text(owner)
    handle = os.open(path, os.O_RDWR)
    fcntl.flock(handle, how)
    timer = threading.Timer(seconds, lambda: os.close(handle))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_where_a_file_system_has_no_locks_a_killed_run_goes_on(tmp_path, monkeypatch):
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / LOCK).write_text("process 1 on a node")
    assert holder(tmp_path) == ""
    check_run_dir(tmp_path)
    release(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_a_run_starts_though_somebody_looks_at_that_moment_whether_it_does(tmp_path):
    with held(tmp_path / LOCK, fcntl.LOCK_SH, "", 0.3):
        hold(tmp_path)
    assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
    release(tmp_path)


def test_the_lock_of_another_node_is_waited_for_in_case_that_node_has_died(tmp_path, monkeypatch):
    monkeypatch.setattr(file_lock, "_PATIENCE_S", 0.0)
    path = tmp_path / "lock"
    with held(path, fcntl.LOCK_EX, "process 1 on elsewhere", 0.5):
        unlock(locked(path, "this", "wait"), path)
    monkeypatch.setattr(file_lock, "_PATIENCE_WITH_NODES_S", 0.2)
    with (
        held(path, fcntl.LOCK_EX, "process 1 on elsewhere", 0.5),
        pytest.raises(GliderError, match=r"this is being written by another job \(process 1 on elsewhere\); wait"),
    ):
        locked(path, "this", "wait")


def test_a_lock_that_another_node_deletes_while_it_is_taken_is_not_held_by_two(tmp_path, monkeypatch):
    path, flock = tmp_path / "lock", fcntl.flock

    def too_late(handle: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(fcntl, "flock", too_late)
    handle = locked(path, "this", "wait")
    with pytest.raises(GliderError, match="this is being written by another job"):
        locked(path, "this", "wait")
    unlock(handle, path)
    assert not path.exists()


def test_a_file_that_has_taken_the_place_of_the_lock_stays(tmp_path):
    path = tmp_path / "lock"
    handle = locked(path, "this", "wait")
    path.unlink()
    path.write_text("of somebody else")
    unlock(handle, path)
    assert path.read_text() == "of somebody else"


def test_a_run_directory_that_is_there_is_held_from_the_check_on(tmp_path):
    check_run_dir(tmp_path)
    assert holder(tmp_path) == (tmp_path / LOCK).read_text()
    release(tmp_path)
    assert list(tmp_path.iterdir()) == []
