"""Checkpoints that do not know the world: a name has a folder, a step has a file, and a file proves itself.

    FOLDER/NAME/step-00000100.safetensors

A file holds the tensors of one expert (or of what all experts share), and in its header a JSON record, the
SHA-256 of tensors and record, and the id of the W&B run that a resumed job continues. A checkpoint of many
names is the set of their files of one step, and counts if all of them are good: every rank writes what it
holds, and any other world reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from glider_dist.errors import GliderError
from glider_dist.pool.files import remove_folder, replacing, save_tensors
from glider_dist.pool.names import check_name

FORMAT = "1"
_FILE = re.compile(r"step-(\d{8,})\.safetensors")


class Damaged(GliderError):
    """A checkpoint file that is not what was written: cut off, changed, or of another format."""


@dataclass(frozen=True)
class Part:
    """One file's content: tensors on the CPU, by key, and the record."""

    tensors: dict[str, torch.Tensor]
    record: dict[str, Any]


class Checkpoints:
    """The checkpoint files below one folder.

    Attributes:
        keep_last: files kept of each name, the newest ones.
        wandb_id: tells the W&B run that the files are of; "" if there is none.
    """

    def __init__(self, folder: Path, keep_last: int = 2, wandb_id: Callable[[], str] = lambda: ""):
        self.folder = folder
        self.keep_last = keep_last
        self.wandb_id = wandb_id

    def path(self, name: str, step: int) -> Path:
        """Raises GliderError if the name could lead out of the folder."""
        return self.folder / check_name(name, "checkpoint") / f"step-{step:08d}.safetensors"

    def names(self) -> list[str]:
        """Whose files are there."""
        if not self.folder.is_dir():
            return []
        found = (entry.name for entry in self.folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
        return sorted(name for name in found if self.steps(name))

    def steps(self, name: str) -> list[int]:
        """The steps with a file, good or not, newest first."""
        folder = self.folder / check_name(name, "checkpoint")
        if not folder.is_dir():
            return []
        found = (_FILE.fullmatch(path.name) for path in folder.iterdir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def write(self, name: str, step: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Write a file, then delete older ones that are no longer kept, and ones of later steps: of a training
        that was given up.

        Args:
            tensors: contiguous, on the CPU, and not written to by anybody meanwhile.
            record: a JSON object.

        Raises:
            OSError: the disk is full or cannot be written; the files of before are untouched.
        """
        path = self.path(name, step)
        text = json.dumps(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(".*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        with replacing(path) as temporary:
            metadata = {"format_version": FORMAT, "name": name, "record": text, "sha256": _digest(tensors, text)}
            metadata["wandb_id"] = self.wandb_id()
            save_tensors(tensors, temporary, metadata)
        earlier = [other for other in self.steps(name) if other <= step]
        for other in set(self.steps(name)) - set(earlier[: self.keep_last]):
            self.path(name, other).unlink(missing_ok=True)

    def record(self, name: str, step: int) -> dict[str, Any]:
        """A file's record, from its header alone.

        Raises:
            Damaged: it is no checkpoint file.
            GliderError: it cannot be read at all.
        """
        with _opened(self.path(name, step)) as file:
            return _record(self.path(name, step), name, file.metadata() or {})

    def read(self, name: str, step: int) -> Part:
        """A file's content, checked.

        Raises:
            Damaged: the checksum or the format does not fit.
            GliderError: it cannot be read at all.
        """
        path = self.path(name, step)
        with _opened(path) as file:
            metadata = file.metadata() or {}
            record = _record(path, name, metadata)
            try:
                keys = file.keys()
                tensors = {key: file.get_tensor(key) for key in keys}
            except SafetensorError as error:
                raise Damaged(f"{path} cannot be read ({error})") from None
        if _digest(tensors, metadata["record"]) != metadata.get("sha256"):
            raise Damaged(f"{path} has changed since it was written (its checksum differs)")
        return Part(tensors, record)

    def some(self, name: str, step: int, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
        """The tensors with a wanted key of a file that has been checked already."""
        with _opened(self.path(name, step)) as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys if wanted(key)}

    def remove_later(self, name: str, step: int) -> None:
        """Delete a name's files of later steps than this one.

        Raises:
            OSError: one cannot be deleted.
        """
        for other in self.steps(name):
            if other > step:
                self.path(name, other).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Delete a name's files."""
        folder = self.folder / check_name(name, "checkpoint")
        if folder.is_dir():
            remove_folder(folder)

    def clear_up(self) -> None:
        """Delete what a process that was killed while it deleted has left."""
        for left in self.folder.glob(".*.old"):
            shutil.rmtree(left, ignore_errors=True)


def wandb_id_of(checkpoints: Path) -> str:
    """The W&B run that the files in and below a folder are of; "" if none says."""
    for path in sorted(checkpoints.rglob("step-*.safetensors")):
        with contextlib.suppress(GliderError), _opened(path) as file:
            if found := (file.metadata() or {}).get("wandb_id", ""):
                return str(found)
    return ""


def _opened(path: Path) -> Any:
    if path.is_symlink():
        raise GliderError(f"{path} is a link; a checkpoint is a file of its own, put the file itself there")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise Damaged(f"{path} is damaged ({error})") from None
    except OSError as error:
        raise GliderError(
            f"{path} cannot be read ({error.strerror or error}); make it readable, or delete it to do without"
        ) from None


def _record(path: Path, name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format_version") != FORMAT or metadata.get("name") != name:
        raise Damaged(f"{path} is no checkpoint of {name!r} in format {FORMAT}")
    try:
        value = json.loads(metadata["record"])
    except (KeyError, json.JSONDecodeError):
        raise Damaged(f"{path} is damaged (its record is no JSON)") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path} is damaged (its record is no object)")
    return value


def _digest(tensors: Mapping[str, torch.Tensor], record: str) -> str:
    digest = hashlib.sha256(record.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"\0{key}\0{tensor.dtype}{list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
