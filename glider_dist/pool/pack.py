"""A pool as one tar file, and back, with nothing in it but a pool's own plain files."""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

from glider_dist.errors import GliderError
from glider_dist.pool.files import replacing, replacing_folder
from glider_dist.pool.store import ExpertPool
from glider_dist.pool.verify import stray_files
from glider_dist.tracking.progress import progress

_SUFFIXES = (".json", ".safetensors")


def pack(pool: ExpertPool, file: Path) -> int:
    """Write the pool's files, sorted and without owners and times, as an uncompressed tar; returns their number.

    Raises:
        GliderError: the pool holds a link that leaves it, or a pickle.
    """
    if problems := stray_files(pool.path):
        raise GliderError(problems[0])
    paths = [
        path for path in sorted(pool.path.rglob("*")) if _belongs(path.relative_to(pool.path)) and path.is_file()
    ]
    with replacing(file) as temporary, tarfile.open(temporary, "w") as archive:
        for path in progress(paths, desc="packing", enabled=len(paths) > 60):
            info = tarfile.TarInfo(path.relative_to(pool.path).as_posix())
            info.size = path.stat().st_size
            with open(path, "rb") as content:
                archive.addfile(info, content)
    return len(paths)


def _belongs(path: PurePosixPath | Path) -> bool:
    return path.suffix in _SUFFIXES and not any(part.startswith(".") for part in path.parts)


def unpack(file: Path, target: Path) -> ExpertPool:
    """Unpack a pool; ``target`` appears whole or not at all.

    Raises:
        GliderError: ``target`` is there already, or the file is no tar of a pool: a name that leaves the folder, a
            link, a device, or any file that pools do not have.
    """
    if target.exists():
        raise GliderError(f"{target} is there already; name a new folder")
    if not hasattr(tarfile, "data_filter"):
        raise GliderError("this Python cannot unpack safely; use 3.10.12, 3.11.4 or newer")
    try:
        with tarfile.open(file, "r:") as archive, replacing_folder(target, replace=False) as folder:
            members = archive.getmembers()
            for member in members:
                _check_member(file, member)
            for member in progress(members, desc="unpacking", enabled=len(members) > 60):
                archive.extract(member, folder, filter="data")
            (folder / "experts").mkdir(exist_ok=True)
            ExpertPool.open(folder)
    except FileNotFoundError:
        raise GliderError(f"{file} does not exist") from None
    except FileExistsError:
        raise GliderError(f"{target} is there already; name a new folder") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise GliderError(f"{file} is no tar file that pool pack wrote ({error})") from None
    return ExpertPool.open(target)


def _check_member(file: Path, member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise GliderError(f"{file} holds {member.name!r}, which would land outside the pool; nothing was unpacked")
    if not member.isfile() and not member.isdir():
        raise GliderError(f"{file} holds {member.name!r}, which is no plain file; nothing was unpacked")
    if member.isfile() and not _belongs(path):
        raise GliderError(f"{file} holds {member.name!r}, which is no file of a pool; nothing was unpacked")
