"""What a user names on ``pool import``: folders, globs, hub ids, checkpoints, or a text file that lists them."""

from __future__ import annotations

import glob
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from glider_dist.errors import GliderError, first_line
from glider_dist.pool.adapter import (
    CARD_FILE,
    GATE_FILE,
    WEIGHTS_FILE,
    AdapterInfo,
    inspect_adapter,
    pair_up,
    read_gate,
)
from glider_dist.pool.adapter_config import CONFIG_FILE, read_config
from glider_dist.pool.files import read_json, sha256, write_tensors
from glider_dist.pool.header import info_of
from glider_dist.pool.names import natural_key
from glider_dist.pool.published import SUFFIXES, PublishedExpert, load_pickled, read_published

log = logging.getLogger(__name__)
PICKLED_FILE = "adapter_model.bin"
_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")
_NAMED = re.compile(r"(?P<name>[A-Za-z0-9_][\w.\-]*)=(?P<path>.+)")
# Files that lie beside adapters and are no list of them.
_NO_LISTS = (".json", ".safetensors", ".md", ".yaml", ".yml")
_HUB_FILES = [CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE, GATE_FILE, "README.md"]


@dataclass(frozen=True)
class PeftFolder:
    """A PEFT adapter on disk: safetensors are copied byte for byte, an old ``.bin`` file is rewritten as such."""

    name: str
    origin: str
    folder: Path
    gate_file: Path | None = None

    @property
    def readme_folder(self) -> Path:
        return self.folder

    @property
    def base(self) -> str | None:
        return read_config(self.folder).get("base_model_name_or_path")

    @property
    def _pickled(self) -> bool:
        return not (self.folder / WEIGHTS_FILE).exists() and (self.folder / PICKLED_FILE).exists()

    @property
    def _gate_file(self) -> Path:
        return self.gate_file or self.folder / GATE_FILE

    @cached_property
    def info(self) -> AdapterInfo:
        if not self._pickled:
            return inspect_adapter(self.folder)
        read_config(self.folder)
        path = self.folder / PICKLED_FILE
        return pair_up({key: info_of(tensor) for key, tensor in load_pickled(path).items()}, str(path))

    def gate(self) -> dict[str, torch.Tensor] | None:
        return read_gate(self._gate_file) if self.gate_file or self._gate_file.exists() else None

    def sha256(self) -> dict[str, str]:
        weights = PICKLED_FILE if self._pickled else WEIGHTS_FILE
        return {file: sha256(self.folder / file) for file in (CONFIG_FILE, weights)}

    def card(self) -> dict[str, Any]:
        """What an exported expert brings along; its hashes are made anew."""
        path = self.folder / CARD_FILE
        card = read_json(path) if path.exists() else {}
        return {key: value for key, value in card.items() if key not in ("name", "files", "summary", "origin")}

    def fill(self, folder: Path, base: str, known: Mapping[str, Any]) -> None:
        shutil.copyfile(self.folder / CONFIG_FILE, folder / CONFIG_FILE)
        if self._pickled:
            write_tensors(folder / WEIGHTS_FILE, load_pickled(self.folder / PICKLED_FILE))
        else:
            shutil.copyfile(self.folder / WEIGHTS_FILE, folder / WEIGHTS_FILE)
        if self._gate_file.exists():
            shutil.copyfile(self._gate_file, folder / GATE_FILE)


Source = PeftFolder | PublishedExpert


def find_adapters(words: Sequence[str], folder: Path | None = None) -> list[Source]:
    """Every adapter that ``words`` name, in order, each once.

    Args:
        words: a PEFT folder; a folder of such folders; a pool; a glob of them (``**`` for any depth); a published
            checkpoint (``.pt``, ``.pth``, ``.bin``); a hub id; a text file with any of these, one a line, ``#``
            for comments; each may be written ``NAME=...``. A list's relative paths start from its own folder.
        folder: where relative paths start; None is the working directory.

    Raises:
        GliderError: nothing is there, or the hub cannot be asked.
    """
    found: list[Source] = []
    for word in words:
        named = _NAMED.fullmatch(word) if not _path(word, folder).exists() else None
        name, place = (named["name"], named["path"]) if named else (None, word)
        some = _expand(place, name, folder)
        if named and len(some) > 1 and any(isinstance(source, PeftFolder) for source in some):
            raise GliderError(f"{word!r} names one expert, but {place} holds {len(some)} adapters")
        found += some
    return list({(source.name, source.origin, *_row(source)): source for source in found}.values())


def _row(source: Source) -> tuple[str, ...]:
    return tuple(source.hashes) if isinstance(source, PublishedExpert) else (str(source.folder.resolve()),)


def _path(word: str, folder: Path | None) -> Path:
    path = Path(word).expanduser()
    return path if folder is None or path.is_absolute() else folder / path


def _expand(word: str, name: str | None, folder: Path | None) -> list[Source]:
    if not word:
        raise GliderError("an adapter is named by an empty word; name a folder, a file or a hub id")
    path = _path(word, folder)
    if path.is_dir():
        return _from_folder(path, name)
    if path.is_file():
        return _from_file(path, name, in_list=folder is not None)
    if glob.has_magic(word):
        return _from_glob(word, path, name, in_list=folder is not None)
    if _HUB_ID.fullmatch(word):
        return [PeftFolder(name or word.rsplit("/", 1)[-1], word, _download(word))]
    raise GliderError(f"there is no folder, file or hub id {word!r}")


def _from_glob(word: str, path: Path, name: str | None, in_list: bool) -> list[Source]:
    # Sorted like the pool, so that a table reads in its order.
    hits = [Path(hit) for hit in sorted(glob.glob(str(path), recursive=True), key=natural_key)]
    if "**" in word:
        # Any depth also finds what lies around and between the adapters.
        hits = [hit for hit in hits if (hit / CONFIG_FILE).exists()]
    if not hits:
        raise GliderError(f"nothing matches {word!r}")
    folders = [hit for hit in hits if hit.is_dir()]
    found: list[Source] = []
    for hit in folders or hits:
        found += _from_folder(hit, name) if folders else _from_file(hit, name, in_list)
    return found


def _from_file(path: Path, name: str | None, in_list: bool) -> list[Source]:
    if path.name in (CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE):
        raise GliderError(f"{path} is one file of an adapter; name its folder, {path.parent}")
    if path.suffix in SUFFIXES:
        return list(read_published(path, name or path.stem.removesuffix("_best")))
    if path.suffix in _NO_LISTS:
        raise GliderError(f"{path} is no adapter: that is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if in_list:
        raise GliderError(f"{path} is a list within a list; write its adapters here")
    return _from_list(path)


def _from_folder(path: Path, name: str | None) -> list[Source]:
    if (path / "pool.json").exists():
        path = path / "experts"
    inside = sorted((child for child in path.iterdir() if (child / CONFIG_FILE).exists()), key=_order)
    if (path / CONFIG_FILE).exists():
        # A trainer's checkpoints are earlier states of the same adapter.
        others = [child.name for child in inside if not child.name.startswith("checkpoint-")]
        if others:
            log.warning("%s: the adapters in its folders (%s) stay out; name them, too", path, ", ".join(others))
        return [PeftFolder(name or path.resolve().name, str(path), path)]
    if inside:
        return [PeftFolder(name or child.name, str(child), child) for child in inside]
    files = sorted((child for child in path.iterdir() if child.suffix in SUFFIXES), key=_order)
    if not files:
        raise GliderError(
            f"{path} holds no {CONFIG_FILE}, no folders with one and no checkpoint; "
            f"what lies deeper is found by '{path / '**'}'"
        )
    # PHATGOOSE keeps each run's checkpoint as RUN/best.pt.
    stems = [path.resolve().name if file.stem == "best" else file.stem.removesuffix("_best") for file in files]
    experts: list[Source] = []
    for file, stem in zip(files, stems, strict=True):
        experts += read_published(file, name or stem)
    return experts


def _order(path: Path) -> Any:
    return natural_key(path.name)


def _from_list(path: Path) -> list[Source]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise GliderError(
            f"{path} is neither a text file with one adapter a line nor a checkpoint ({', '.join(SUFFIXES)})"
        ) from None
    found: list[Source] = []
    for number, line in enumerate(lines, 1):
        word = line.partition("#")[0].strip()
        if not word:
            continue
        try:
            found += find_adapters([word], path.parent)
        except GliderError as error:
            raise GliderError(f"{path} line {number}: {error}") from None
    if not found:
        raise GliderError(f"{path} lists no adapters")
    return found


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except LocalEntryNotFoundError:
        raise GliderError(
            f"there is no folder {hub_id}, and as a hub id it is not cached and there is no network; "
            "copy the adapter's folder here and name that"
        ) from None
    except (HFValidationError, OSError, ValueError) as error:
        raise GliderError(f"the hub does not give out {hub_id!r} ({first_line(error)}); check the id") from None
