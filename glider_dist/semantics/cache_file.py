"""A cache on disk: bytes by key, bounded, in an SQLite file that several processes may share."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

_SCHEMA = "CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, entry BLOB NOT NULL, used INTEGER NOT NULL)"
_VARIABLES = 500  # in one statement; old builds of SQLite take 999
_SLACK = 0.1  # share of the bound that is freed at once


class CacheFile:
    """Entries in an SQLite file, ``limit`` of them at most; those not used for longest go first.

    Several processes may share the file. A cache may be lost but must not stop a service: a damaged file is
    moved aside, and one that cannot be written costs a warning.
    """

    def __init__(self, path: Path, limit: int):
        self.path = path
        self.limit = limit
        self._lock = threading.Lock()
        self._rows = 0
        self._connection: sqlite3.Connection | None = None
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._set_aside(error)
        except OSError as error:
            log.warning("nothing is kept on disk: %s cannot be opened (%s)", path, error)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=10.0, check_same_thread=False, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            # A crash of the machine may lose the last entries, which are computed again; never the file.
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(_SCHEMA)
            self._rows = int(connection.execute("SELECT count(*) FROM entries").fetchone()[0])
        except BaseException:
            connection.close()
            raise
        os.chmod(self.path, 0o600)
        self._connection = connection

    def _set_aside(self, error: Exception) -> None:
        """Start anew if the file is damaged; go on without one if it is merely locked or not writable."""
        self._close()
        damaged = not isinstance(error, sqlite3.OperationalError)
        if damaged:
            log.warning("%s is damaged (%s); a new cache is started", self.path, error)
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    os.replace(f"{self.path}{suffix}", f"{self.path}{suffix}.damaged")
            try:
                self._open()
                return
            except (OSError, sqlite3.Error) as again:
                error = again
        log.warning("nothing more is kept on disk: %s cannot be used (%s)", self.path, error)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The entries that are there."""
        found: dict[bytes, bytes] = {}
        with self._lock:
            if self._connection is None:
                return found
            try:
                for start in range(0, len(keys), _VARIABLES):
                    part = keys[start : start + _VARIABLES]
                    marks = ",".join("?" * len(part))
                    rows = self._connection.execute(
                        f"SELECT key, entry FROM entries WHERE key IN ({marks})", part
                    ).fetchall()
                    found.update(rows)
                if found:
                    self._touch(list(found))
            except sqlite3.DatabaseError as error:
                self._set_aside(error)
        return found

    def _touch(self, keys: list[bytes]) -> None:
        assert self._connection is not None
        now = int(time.time())
        for start in range(0, len(keys), _VARIABLES):
            part = keys[start : start + _VARIABLES]
            marks = ",".join("?" * len(part))
            # Entries used within the hour are as good as new, and reading stays reading.
            self._connection.execute(
                f"UPDATE entries SET used=? WHERE used < ? AND key IN ({marks})", (now, now - 3600, *part)
            )

    def put(self, entries: Mapping[bytes, bytes]) -> None:
        if not entries:
            return
        with self._lock:
            if self._connection is None:
                return
            try:
                self._insert(entries.items())
            except sqlite3.DatabaseError as error:
                self._set_aside(error)

    def _insert(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        connection = self._connection
        assert connection is not None
        now = int(time.time())
        connection.execute("BEGIN IMMEDIATE")
        try:
            cursor = connection.executemany(
                "INSERT OR IGNORE INTO entries VALUES (?, ?, ?)", [(key, entry, now) for key, entry in entries]
            )
            self._rows += max(cursor.rowcount, 0)
            if self._rows > self.limit:
                # Other processes may have written, too.
                self._rows = int(connection.execute("SELECT count(*) FROM entries").fetchone()[0])
                excess = self._rows - int(self.limit * (1 - _SLACK))
                if self._rows > self.limit:
                    connection.execute(
                        "DELETE FROM entries WHERE key IN (SELECT key FROM entries ORDER BY used, rowid LIMIT ?)",
                        (excess,),
                    )
                    self._rows -= excess
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def _close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def close(self) -> None:
        with self._lock:
            self._close()
