"""A cache on disk: bytes by key, bounded, in an SQLite file that several processes may share."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

_SCHEMA = "CREATE TABLE IF NOT EXISTS proven (key BLOB PRIMARY KEY, entry BLOB NOT NULL, used INTEGER NOT NULL)"
# Of earlier versions, whose entries do not tell whose they are.
_OLD_SCHEMA = "CREATE TABLE entries (key BLOB PRIMARY KEY, entry BLOB NOT NULL, used INTEGER NOT NULL)"
_PROOF = 8  # bytes before each entry
_VARIABLES = 500  # in one statement; old builds of SQLite take 999
_SLACK = 0.1  # share of the bound that is freed at once
_PATIENCE = 0.5  # seconds for others to end their transaction; requests wait for it
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds that a locked file is left alone


class CacheFile:
    """Entries in an SQLite file, ``limit`` of them at most; those not used for longest go first.

    Several processes may share the file, on several hosts, too, where locks of the file system hold between hosts
    (NFS 4, Lustre mounted with ``flock``). A cache may be lost but must not stop a service, and never answers with
    the entry of another key: a damaged file is moved aside, one that is locked is left alone for a while, and one
    that cannot be used costs a warning.
    """

    def __init__(self, path: Path, limit: int):
        self.path = path
        self.limit = limit
        self._lock = threading.Lock()
        self._rows = 0
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._next = 0.0
        self._pause = _FIRST_PAUSE
        self._use(lambda connection: None)

    def _use(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Do ``work`` with the file, unless it cannot be used now."""
        with self._lock:
            if time.monotonic() < self._next:
                return
            try:
                if self._connection is None:
                    self._connection = self._open()
                work(self._connection)
                self._pause = _FIRST_PAUSE
            except (OSError, sqlite3.Error) as error:
                self._failed(error)

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch(mode=0o600)  # SQLite's journal gets the same
        os.chmod(self.path, 0o600)
        self._file = _identity(self.path)
        connection = sqlite3.connect(self.path, timeout=_PATIENCE, check_same_thread=False, isolation_level=None)
        try:
            # A write-ahead log is shared memory, which hosts do not share. This converts a file that has one.
            (mode,) = connection.execute("PRAGMA journal_mode=TRUNCATE").fetchone()
            if mode != "truncate":
                raise sqlite3.OperationalError(f"database is locked in journal mode {mode}")
            # A crash of the machine may damage the file: that is noticed, and entries are computed again.
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(_SCHEMA)
            if connection.execute("SELECT 1 FROM sqlite_master WHERE sql=?", (_OLD_SCHEMA,)).fetchone():
                connection.execute("DROP TABLE entries")
            self._rows = _count(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _failed(self, error: Exception, tries: int = 3) -> None:
        """Leave a locked file alone for a while, start anew if it is damaged or another is in its place, and else
        go on without one."""
        if isinstance(error, sqlite3.OperationalError) and "lock" in str(error):
            log.warning("%s is in use by others (%s); it is left alone for %g s", self.path, error, self._pause)
            self._next = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            return
        self._close()
        replaced = self._file is not None and self._file != _identity(self.path)
        # Of other errors SQLite has subclasses.
        if not tries or not (replaced or type(error) is sqlite3.DatabaseError):
            log.warning("nothing more is kept on disk: %s cannot be used (%s)", self.path, error)
            self._next = math.inf
            return
        if replaced:
            # Most likely by another process that found it damaged; what lies there now is not.
            log.info("%s was replaced by others (%s); it is opened again", self.path, error)
        else:
            log.warning("%s is damaged (%s); a new cache is started", self.path, error)
            # The file last: with its journal beside it, the next one would be taken for half written.
            for suffix in ("-journal", "-wal", "-shm", ""):
                with contextlib.suppress(OSError):
                    os.replace(f"{self.path}{suffix}", f"{self.path}{suffix}.damaged")
        try:
            self._connection = self._open()
        except (OSError, sqlite3.Error) as again:
            self._failed(again, tries - 1)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The entries that are there."""
        found: dict[bytes, bytes] = {}

        def read(connection: sqlite3.Connection) -> None:
            now = int(time.time())
            old: list[bytes] = []
            for part, marks in _parts(keys):
                # Entries used within the hour are as good as new, and reading stays reading.
                rows = connection.execute(
                    f"SELECT key, entry, used < ? FROM proven WHERE key IN ({marks})", (now - 3600, *part)
                )
                for key, row, is_old in rows.fetchall():
                    # A page that was half written may pass for one.
                    if _is_of(key, row):
                        found[key] = row[_PROOF:]
                        old += [key] if is_old else []
            for part, marks in _parts(old):
                connection.execute(f"UPDATE proven SET used=? WHERE key IN ({marks})", (now, *part))

        self._use(read)
        return found

    def put(self, entries: Mapping[bytes, bytes]) -> None:
        """Keep the entries, unless the file cannot be written now."""
        if entries:
            self._use(lambda connection: self._insert(connection, entries.items()))

    def _insert(self, connection: sqlite3.Connection, entries: Iterable[tuple[bytes, bytes]]) -> None:
        now = int(time.time())
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Whoever puts an entry has not found it: what is there under its key is worth nothing.
            cursor = connection.executemany(
                "INSERT OR REPLACE INTO proven VALUES (?, ?, ?)",
                [(key, _proof(key, entry) + entry, now) for key, entry in entries],
            )
            rows = self._rows + max(cursor.rowcount, 0)
            if rows > self.limit:
                # Other processes may have written, too.
                rows = _count(connection)
                excess = rows - int(self.limit * (1 - _SLACK))
                if rows > self.limit:
                    connection.execute(
                        "DELETE FROM proven WHERE key IN (SELECT key FROM proven ORDER BY used, rowid LIMIT ?)",
                        (excess,),
                    )
                    rows -= excess
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        self._rows = rows

    def _close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Let go of the file; from here on nothing is found and nothing kept."""
        with self._lock:
            self._close()
            self._next = math.inf


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode, by which a file is known whatever its name; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _parts(keys: Sequence[bytes]) -> Iterator[tuple[Sequence[bytes], str]]:
    """The keys of one statement after another, with their question marks."""
    for start in range(0, len(keys), _VARIABLES):
        part = keys[start : start + _VARIABLES]
        yield part, ",".join("?" * len(part))


def _count(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM proven").fetchone()[0])


def _proof(key: bytes, entry: bytes) -> bytes:
    return hashlib.blake2b(key + entry, digest_size=_PROOF).digest()


def _is_of(key: object, row: object) -> bool:
    return isinstance(key, bytes) and isinstance(row, bytes) and row[:_PROOF] == _proof(key, row[_PROOF:])
