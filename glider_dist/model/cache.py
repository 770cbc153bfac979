"""The folder with what is prepared once per machine: converted base models and the hashes of weight files."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from glider_dist.errors import GliderError
from glider_dist.pool.files import read_json, sha256, sync_file, sync_folder, write_json

log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """``$GLIDER_DIST_CACHE``, else ``~/.cache/glider_dist``. The folder need not exist yet."""
    return Path(os.environ.get("GLIDER_DIST_CACHE") or "~/.cache/glider_dist").expanduser()


def build_once(name: str, build: Callable[[Path], Path]) -> Path:
    """Return ``<cache>/models/<name>``, which the first process to ask for it builds.

    ``build(work)`` gets an empty scratch folder and returns the folder inside it that is to be kept. That
    folder appears under its final name complete or not at all: other processes wait, and a process
    killed half-way leaves only scratch, which the next one removes.

    Raises:
        GliderError: the cache folder cannot be written or locked. What ``build`` raises passes through.
    """
    models = cache_dir() / "models"
    target = models / name
    if target.is_dir():
        return target
    with _locked(models / f"{name}.lock"):
        if target.is_dir():
            return target
        # Whoever holds the lock is alone, so scratch found here belongs to a process that died.
        for abandoned in models.glob(f".{name}.*.partial"):
            shutil.rmtree(abandoned, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=models))
        try:
            finished = build(work)
            _persist(finished)
            os.replace(finished, target)
            sync_folder(models)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def remembered_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, remembered in ``<cache>/hashes.json`` by path, size and modification time."""
    path = path.resolve()
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    record = cache_dir() / "hashes.json"
    known = _read_hashes(record).get(str(path))
    if known is not None and known[:2] == stamp:
        return str(known[2])
    digest = sha256(path)
    try:
        with _locked(record.with_suffix(".lock")):
            write_json(record, {**_read_hashes(record), str(path): [*stamp, digest]})
    except (GliderError, OSError) as error:
        # A read-only cache costs the time to hash again, nothing else.
        log.debug("cannot remember the hash of %s: %s", path, error)
    return digest


def weights_hash(folder: Path) -> str | None:
    """Hex SHA-256 over the contents of the folder's ``model*.safetensors``, in order of their names.

    It is the hash of the files' own SHA-256 digests (32 bytes each), so each file is read once and
    remembered by :func:`remembered_sha256`. None if the folder has no such file.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        return None
    return hashlib.sha256(b"".join(bytes.fromhex(remembered_sha256(file)) for file in files)).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process to release %s", path)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise GliderError(
            f"cannot write or lock files in {path.parent} ({error}); set GLIDER_DIST_CACHE to a writable folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _read_hashes(record: Path) -> dict[str, list[int | str]]:
    try:
        return read_json(record)
    except GliderError:
        return {}


def _persist(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            # safetensors writes with mode 0600; others who share the cache must be able to read it.
            path.chmod(0o644)
            sync_file(path)
    sync_folder(folder)
