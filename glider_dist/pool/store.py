"""The pool on disk: the only interface between stages. Opening it reads metadata; weights are read lazily.

    pool.json                   format version, base model and its fingerprint
    experts/NAME/               adapter_config.json, adapter_model.safetensors, gate.safetensors, card.json
    router/                     embeddings of the descriptions, calibration

Which experts exist is read from ``experts/``, so that jobs of an array add folders side by side and never
write one shared file. Needs no GPU, no model and no torch.distributed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from glider_dist.errors import GliderError
from glider_dist.pool.adapter import (
    CARD_FILE,
    GATE_FILE,
    WEIGHTS_FILE,
    SiteLora,
    inspect_adapter,
    read_adapter,
    read_gate,
    site_shapes,
)
from glider_dist.pool.adapter_config import CONFIG_FILE, read_config
from glider_dist.pool.files import (
    read_json,
    remove_folder,
    replacing_folder,
    sha256,
    write_json,
    write_new_json,
    write_tensors,
)
from glider_dist.pool.fingerprint import Fingerprint, check_gate, check_sites
from glider_dist.pool.names import check_name, natural_key

FORMAT = 1


class Expert:
    """A handle on one expert's folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = folder.name

    @property
    def has_gate(self) -> bool:
        """Whether it has a finished gate; reads the card and raises as :meth:`card`."""
        return self.has_gate_by(self.card())

    def has_gate_by(self, card: dict[str, Any]) -> bool:
        """As :attr:`has_gate`, for who has the ``card``: it is written after the gate, which it must name."""
        return GATE_FILE in (card.get("files") or {}) and (self.folder / GATE_FILE).exists()

    def _inside(self, *files: str) -> Path:
        """The path of the last of its files; raises GliderError if any is a link that leaves the pool."""
        for file in files:
            path = self.folder / file
            if path.is_symlink() and not path.resolve().is_relative_to(self.folder.parents[1].resolve()):
                raise GliderError(f"{path} is a link that leaves the pool; put the file itself there")
        return path

    def card(self) -> dict[str, Any]:
        """What the pool notes of the expert; empty if there is no card.

        Raises:
            GliderError: it is no JSON object, or its hashes or its summary are none.
        """
        path = self._inside(CARD_FILE)
        again = "remove the expert and add it again"
        card = read_json(path, again) if path.exists() else {}
        if not all(isinstance(card.get(key) or {}, dict) for key in ("files", "summary")):
            raise GliderError(f"{path} is no card of an expert; {again}")
        return card

    def config(self) -> dict[str, Any]:
        return read_config(self._inside(CONFIG_FILE).parent)

    def weights(self) -> dict[str, SiteLora]:
        """``{site: SiteLora}``, read from disk."""
        return read_adapter(self._inside(CONFIG_FILE, WEIGHTS_FILE).parent)

    def gate(self) -> dict[str, torch.Tensor]:
        """Raw gate vectors ``{site: v [d_in]}``, read from disk."""
        return read_gate(self._inside(GATE_FILE))

    def shapes(self) -> dict[str, tuple[int, int]]:
        """``{site: (d_out, d_in)}`` from the file's header."""
        return site_shapes(self._inside(WEIGHTS_FILE).parent)

    def summary(self, card: dict[str, Any]) -> dict[str, Any]:
        """Sites, ranks, dtype and bytes as its ``card`` has them, else from the headers."""
        return card.get("summary") or inspect_adapter(self.folder).summary()

    def update_card(self, **values: Any) -> None:
        write_json(self.folder / CARD_FILE, {**self.card(), **values})

    def write_gate(self, gate: dict[str, torch.Tensor], **card: Any) -> None:
        """Store the gate and note its hash in the card."""
        path = self.folder / GATE_FILE
        write_tensors(path, gate)
        files = {**self.card().get("files", {}), GATE_FILE: sha256(path)}
        self.update_card(**card, files=files)


class ExpertPool:
    """A pool of experts for one base model. Use :meth:`create` or :meth:`open`.

    Attributes:
        path: the pool's folder.
        base: folder or hub id of the base model.
        fingerprint: what the base must look like.
    """

    def __init__(self, path: Path, base: str, fingerprint: Fingerprint):
        self.path = path
        self.base = base
        self.fingerprint = fingerprint

    @staticmethod
    def create(path: str | os.PathLike[str], base: str, fingerprint: Fingerprint | None = None) -> ExpertPool:
        """Make an empty pool for ``base``, or open the one that is there if it is for the same base.

        Args:
            base: a hub id, or a folder or file, which is noted by its absolute path.
            fingerprint: of the base; None takes what a folder's ``config.json`` says.

        Raises:
            GliderError: if the folder holds a pool for another base, or cannot be made.
        """
        root, base = Path(path), _from_everywhere(base)
        if fingerprint is None:
            config = Path(base) / "config.json"
            fingerprint = Fingerprint(read_json(config).get("model_type")) if config.exists() else Fingerprint()
        try:
            (root / "experts").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GliderError(f"no pool can be made at {root} ({error.strerror or error})") from None
        value = {"format": FORMAT, "base": base, "fingerprint": fingerprint.to_json()}
        if not (root / "pool.json").exists() and write_new_json(root / "pool.json", value):
            return ExpertPool(root, base, fingerprint)
        pool = ExpertPool.open(root)
        pool.check_base(fingerprint)
        return pool

    @staticmethod
    def open(path: str | os.PathLike[str]) -> ExpertPool:
        """Open an existing pool; reads ``pool.json`` and the list of folders only.

        Raises:
            GliderError: if there is no pool or its format is newer than this version.
        """
        root = Path(path)
        if not (root / "pool.json").exists():
            raise GliderError(f"{root} is not a pool (no pool.json); make one with train-experts or pool import")
        value = read_json(root / "pool.json")
        if value.get("format") != FORMAT:
            raise GliderError(f"{root} has pool format {value.get('format')}, this version reads {FORMAT}")
        try:
            return ExpertPool(root, str(value["base"]), Fingerprint.from_json(value.get("fingerprint", {})))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GliderError(f"{root / 'pool.json'} lacks the base or its layers' shapes ({error!r})") from None

    def check_base(self, other: Fingerprint) -> None:
        """Raises GliderError if ``other`` is not the base this pool was made for."""
        difference = self.fingerprint.difference(other)
        if difference:
            raise GliderError(
                f"pool {self.path} was made for another base ({self.base}): {difference}; "
                f"leave base= out, or give base={self.base}"
            )

    @property
    def base_origin(self) -> str:
        """Where the base's name is from, for the message that there is no such base."""
        return f"{self.path / 'pool.json'} names {self.base!r} as the pool's base; if that moved, give base=FOLDER"

    def files(self) -> dict[str, dict[str, str]]:
        """``{expert: {file: sha256}}`` as the cards have them: reads them all."""
        return {expert.name: expert.card().get("files", {}) for expert in self.experts()}

    @property
    def router_dir(self) -> Path:
        return self.path / "router"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The experts in natural order; this order numbers them everywhere. Read once per open pool.

        Raises:
            GliderError: an expert's folder is a link that leaves the pool.
        """
        root = self.path / "experts"
        # A copy of an empty pool may lack the empty folder.
        entries = os.scandir(root) if root.is_dir() else ()
        found = []
        for entry in entries:
            if entry.name.startswith(".") or not entry.is_dir():
                continue
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(self.path.resolve()):
                raise GliderError(f"{entry.path} is a link that leaves the pool; copy the expert in with pool add")
            found.append(entry.name)
        return tuple(sorted(found, key=natural_key))

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self.path / "experts" / name / WEIGHTS_FILE).exists()

    def expert(self, name: str) -> Expert:
        """Raises GliderError if there is no such expert."""
        if name not in self:
            raise GliderError(f"pool {self.path} has no expert {name!r}")
        return Expert(self.path / "experts" / name)

    def experts(self) -> list[Expert]:
        return [Expert(self.path / "experts" / name) for name in self.names]

    def missing_gates(self) -> list[str]:
        return [expert.name for expert in self.experts() if not expert.has_gate]

    def write(self, name: str, fill: Callable[[Path], None], card: dict[str, Any], replace: bool = True) -> Expert:
        """Add or replace an expert: ``fill(folder)`` writes its files, the card gets their hashes and a summary.

        Raises:
            FileExistsError: ``replace`` is false and another process has added an expert of that name.
        """
        check_name(name)
        target = self.path / "experts" / name
        with replacing_folder(target, replace) as folder:
            fill(folder)
            summary = inspect_adapter(folder).summary()
            files = {
                file: sha256(folder / file)
                for file in (CONFIG_FILE, WEIGHTS_FILE, GATE_FILE)
                if (folder / file).exists()
            }
            write_json(folder / CARD_FILE, {"name": name, **card, "files": files, "summary": summary})
        self.__dict__.pop("names", None)
        return Expert(target)

    def add(
        self,
        name: str,
        adapter: str | os.PathLike[str],
        gate: str | os.PathLike[str] | None = None,
        card: dict[str, Any] | None = None,
    ) -> Expert:
        """Copy a PEFT LoRA folder (and a gate file) into the pool, checked and hashed.

        Raises:
            GliderError: the name is taken or not allowed, the adapter cannot be routed, or its shapes differ
                from the base's.
        """
        check_name(name)
        taken = f"pool {self.path} already has an expert {name!r}; remove it first or choose another name"
        if name in self:
            raise GliderError(taken)
        source = Path(adapter)
        shapes = inspect_adapter(source).shapes
        check_sites(name, shapes, self.fingerprint.sites)
        if gate is not None:
            check_gate(name, read_gate(Path(gate)), shapes)

        def fill(folder: Path) -> None:
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(source / file, folder / file)
            if gate is not None:
                shutil.copyfile(gate, folder / GATE_FILE)

        try:
            return self.write(name, fill, card or {}, replace=False)
        except FileExistsError:
            raise GliderError(taken) from None

    def remove(self, name: str) -> None:
        """Delete an expert. The index and the calibration notice by themselves that they are stale.

        Raises:
            GliderError: if there is no such expert.
        """
        remove_folder(self.expert(name).folder)
        self.__dict__.pop("names", None)


def _from_everywhere(base: str) -> str:
    """The absolute path of a folder or file; what is neither here, as it is."""
    from glider_dist.model.base import OFFLINE_DEFAULT

    path = Path(base).expanduser()
    return str(path.resolve()) if base != OFFLINE_DEFAULT and path.exists() else base
