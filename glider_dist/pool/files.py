"""Writing files so that a killed process leaves the old file or the new one, never half of one; and reading what
people have written, so that a mistake in it is one sentence."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from glider_dist.errors import GliderError

_LEFT = re.compile(r"\.(?P<name>.+)\.(?:\w{8}\.tmp|(?P<old>\d+\.old))")
"""Names that :func:`replacing_folder` gives to what is not finished, or no longer wanted."""
_UMASK = os.umask(0o022)
os.umask(_UMASK)  # it can only be read by setting it


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def _share(path: Path) -> None:
    """Give it the mode that this user's umask wants: temporary folders, and what safetensors writes, are for the
    owner alone, which would shut out everybody else who works with a pool."""
    now = path.stat().st_mode
    mode = 0o777 if stat.S_ISDIR(now) else 0o666 | (now & 0o111)
    # A folder has the set-group-id bit of the one around it, by which what is made in it belongs to a project.
    path.chmod((mode & ~_UMASK) | (now & 0o7000))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success sync it and rename it over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Ranks on other nodes may have the same process id.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _share(temporary)
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        # Of a write or a sync the system does not say which file it was, and the temporary name says little.
        if error.filename is None or str(error.filename) == str(temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False) + "\n", encoding="utf-8"
        )


def read_text(path: Path, advice: str = "") -> str:
    """Read a UTF-8 file, with or without a byte order mark, whatever the locale.

    Args:
        advice: what to do if it cannot be read, for the message.

    Raises:
        GliderError: if it is missing, unreadable or not UTF-8.
    """
    then = f"; {advice}" if advice else ""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise GliderError(f"{path} does not exist{then}") from None
    except OSError as error:
        raise GliderError(f"{path} cannot be read ({error.strerror}){then}") from None
    except UnicodeDecodeError as error:
        raise GliderError(f"{path} is not UTF-8 text (byte {error.start}){then}") from None


def read_json(path: Path, advice: str = "") -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        advice: what to do if it cannot be read, for the message.

    Raises:
        GliderError: as :func:`read_text`, or if it is malformed or no object, naming the file and the line.
    """
    then = f"; {advice}" if advice else ""
    try:
        value = json.loads(read_text(path, advice))
    except json.JSONDecodeError as error:
        raise GliderError(f"{path} line {error.lineno} is not valid JSON: {error.msg}{then}") from None
    if not isinstance(value, dict):
        raise GliderError(f"{path} must hold a JSON object, not {json.dumps(value):.40}{then}")
    return value


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Save tensors as safetensors, atomically; each is copied to a contiguous CPU tensor of its own."""
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with replacing(path) as temporary:
        save_tensors(plain, temporary, metadata or {})


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Save contiguous CPU tensors that share no memory; not atomic.

    Raises:
        OSError: with its number, also where safetensors hides it in a text (a full disk).
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(path)) from None
        raise


def digest_of(value: Any) -> str:
    """Of a JSON value: equal values have equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def replacing_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; on success sync its files and swap it in for ``path``.

    Raises:
        FileExistsError: ``replace`` is false and another process was first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for inner in (temporary, *temporary.rglob("*")):
            _share(inner)
            (sync_folder if inner.is_dir() else sync_file)(inner)
        if replace and path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            _rename_new(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if not isinstance(error, FileExistsError):
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_up(folder: Path, names: Collection[str]) -> None:
    """Undo what a killed :func:`replacing_folder` has left of some entries; nobody may be writing them now."""
    for left in list(folder.iterdir()):
        found = _LEFT.fullmatch(left.name)
        if found is None or found["name"] not in names:
            continue
        path = folder / found["name"]
        if found["old"] and not path.exists():
            os.rename(left, path)  # killed between its two renames
        else:
            shutil.rmtree(left)


def _rename_new(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(error.errno, "exists", str(target)) from None
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder so that it disappears whole: renamed to a hidden name first."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.old")
    os.rename(path, hidden)
    sync_folder(path.parent)
    shutil.rmtree(hidden)


def write_new_json(path: Path, value: Any) -> bool:
    """Write a JSON file unless it is there already; False if it is. Of several processes one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        sync_file(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
        sync_folder(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)
