"""The cache on disk when others use its file, when earlier versions left one, and when its pages are damaged."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from service_process import MODEL, serving

from glider_dist.semantics.cache_file import CacheFile

KEYS = [i.to_bytes(32, "big") for i in range(400)]
ENTRIES = {key: key * 40 for key in KEYS}

# What earlier versions did, up to the end that leaves the log beside the file.
_EARLIER = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode=WAL")
connection.execute(
    "CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, entry BLOB NOT NULL, used INTEGER NOT NULL)"
)
connection.execute("INSERT INTO entries VALUES (?, ?, 0)", (bytes(32), b"of an earlier version"))
os._exit(0)
"""
_WRITER = """
import sys
from pathlib import Path
from glider_dist.semantics.cache_file import CacheFile
file = CacheFile(Path(sys.argv[1]), 150)
keys = [i.to_bytes(32, "big") for i in range(400)]
for start in range(int(sys.argv[2]), 400, 4):
    file.put({key: key * 40 for key in keys[start : start + 8]})
    assert all(entry == key * 40 for key, entry in file.get(keys).items())
file.close()
"""


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def keeps(file: CacheFile, key: bytes) -> bool:
    file.put({key: ENTRIES[key]})
    return file.get([key]) == {key: ENTRIES[key]}


def test_a_file_of_an_earlier_version_is_converted_and_its_entries_are_not_taken_for_ours(tmp_path: Path):
    path = tmp_path / "cache.sqlite"
    subprocess.run([sys.executable, "-c", _EARLIER, str(path)], check=True)
    assert (tmp_path / "cache.sqlite-wal").stat().st_size > 0
    file = CacheFile(path, 100)
    assert file.get(KEYS) == {}
    assert keeps(file, KEYS[0])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cache.sqlite", "cache.sqlite-journal"]
    assert {each.stat().st_mode & 0o077 for each in tmp_path.iterdir()} == {0}
    # The versions of the format that may read and write it: 2 is a write-ahead log.
    assert path.read_bytes()[18:20] == b"\x01\x01"
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall() == [("proven",)]


def test_another_table_of_that_name_is_left_alone(tmp_path: Path):
    path = tmp_path / "cache.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE entries (key TEXT)")
    assert keeps(CacheFile(path, 100), KEYS[0])
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM entries").fetchone() == (0,)


@pytest.mark.parametrize("how", ["a transaction", "a transaction from the start", "a write-ahead log"])
def test_a_file_that_others_hold_delays_nobody_for_long_and_is_used_again(tmp_path: Path, how: str):
    path = tmp_path / "cache.sqlite"
    if how == "a transaction":
        file = CacheFile(path, 100)
        assert keeps(file, KEYS[0])
    other = sqlite3.connect(path, isolation_level=None)
    if how == "a write-ahead log":
        other.execute("PRAGMA journal_mode=WAL")
        other.execute("CREATE TABLE some (thing)")
        other.execute("BEGIN")
        other.execute("SELECT * FROM some").fetchall()
    else:
        other.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    if how != "a transaction":
        file = CacheFile(path, 100)
    for key in KEYS[1:40]:
        assert file.get([key]) == {}
        file.put({key: ENTRIES[key]})
    # Each of them alone may wait for half a second.
    assert time.monotonic() - started < 10
    other.execute("ROLLBACK")
    other.close()
    assert within(30, lambda: keeps(file, KEYS[1]))


def test_reading_waits_for_no_one_who_is_about_to_write(tmp_path: Path):
    file = CacheFile(tmp_path / "cache.sqlite", 100)
    assert keeps(file, KEYS[0])
    other = sqlite3.connect(tmp_path / "cache.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert file.get([KEYS[0]])
    assert file.get([KEYS[0]])
    other.execute("ROLLBACK")


def test_an_entry_under_another_key_is_not_there_and_can_be_put_again(tmp_path: Path):
    file = CacheFile(tmp_path / "cache.sqlite", 100)
    file.put({key: ENTRIES[key] for key in KEYS[:3]})
    with sqlite3.connect(tmp_path / "cache.sqlite") as other:
        other.execute(
            "UPDATE proven SET entry=(SELECT entry FROM proven WHERE key=?) WHERE key=?", (KEYS[0], KEYS[1])
        )
        other.execute("UPDATE proven SET entry=substr(entry, 1, 4) WHERE key=?", (KEYS[2],))
    assert file.get(KEYS) == {KEYS[0]: ENTRIES[KEYS[0]]}
    assert keeps(file, KEYS[1])


def test_a_page_that_is_half_written_never_answers_with_another_keys_entry(tmp_path: Path):
    path = tmp_path / "cache.sqlite"
    file = CacheFile(path, 20)
    states = []
    for key in KEYS[:100]:
        file.put({key: ENTRIES[key]})
        states.append(path.read_bytes())
    file.close()
    found = 0
    for seed in range(40):
        chance = random.Random(seed)
        at = chance.randrange(40, 80)
        old, new = states[at], states[at + chance.randrange(1, 20)]
        pages = [
            page for page in range(4096, len(new), 4096) if old[page : page + 4096] != new[page : page + 4096]
        ]
        page = chance.choice(pages)
        # A disk writes sectors.
        end = page + 512 * chance.randrange(1, 8)
        torn = tmp_path / f"torn-{seed}.sqlite"
        torn.write_bytes(new[:end] + old[end : page + 4096] + new[page + 4096 :])
        file = CacheFile(torn, 20)
        answers = file.get(KEYS)
        assert all(ENTRIES[key] == entry for key, entry in answers.items())
        found += len(answers)
        file.close()
    assert found > 0


@pytest.mark.parametrize("first_use", ["read", "write"])
def test_who_finds_a_damaged_file_replaced_by_another_goes_on_with_that_ones_new_file(
    tmp_path: Path, first_use: str
):
    path = tmp_path / "cache.sqlite"
    one, other = CacheFile(path, 100), CacheFile(path, 100)
    for key in KEYS[:20]:
        assert keeps(one, key)
    assert other.get(KEYS[:1])
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    one.put({KEYS[29]: ENTRIES[KEYS[29]]})  # by which it notices
    assert keeps(one, KEYS[30])
    if first_use == "read":
        other.get(KEYS[:20])
    else:
        other.put({KEYS[31]: ENTRIES[KEYS[31]]})
    assert keeps(other, KEYS[32])
    assert set(one.get(KEYS)) == set(other.get(KEYS)) >= {KEYS[30], KEYS[32]}


def test_a_file_that_somebody_deletes_is_made_again(tmp_path: Path):
    path = tmp_path / "cache.sqlite"
    file = CacheFile(path, 100)
    assert keeps(file, KEYS[0])
    path.unlink()
    assert within(5, lambda: keeps(file, KEYS[1]) and path.exists())


def test_processes_that_write_at_once_find_their_own_entries_alone(tmp_path: Path):
    path = tmp_path / "cache.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(i)]) for i in range(3)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert 0 < len(CacheFile(path, 150).get(KEYS)) <= 150


@pytest.mark.slow
def test_a_service_answers_while_another_process_holds_its_file(tmp_path: Path):
    with serving(tmp_path) as service, service.http() as http:
        other = sqlite3.connect(tmp_path / "embeddings.sqlite", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        for i in range(20):
            assert http.post("/v1/embeddings", json={"model": MODEL, "input": f"text {i}"}).status_code == 200
        assert time.monotonic() - started < 10
        other.execute("ROLLBACK")
        other.close()
    assert "is in use by others" in service.log.read_text()
