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

from glider_dist.config import OFFLINE_DEFAULT
from glider_dist.errors import GliderError
from glider_dist.pool.adapter import CARD_FILE, EXPERT_FILES, GATE_FILE, WEIGHTS_FILE, inspect_adapter, read_gate
from glider_dist.pool.adapter_config import CONFIG_FILE
from glider_dist.pool.expert import Expert
from glider_dist.pool.files import (
    read_json,
    remove_folder,
    replacing_folder,
    sha256,
    write_json,
    write_new_json,
)
from glider_dist.pool.fingerprint import Fingerprint, check_gate, check_sites
from glider_dist.pool.names import check_name, natural_key

FORMAT = 1


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
        """Folder of the index and the calibration; there only once one of them is."""
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
        """Names of the experts without a finished gate, in the pool's order; reads every card (1 s for 10,000).

        Raises:
            GliderError: as :meth:`Expert.card`.
        """
        return [expert.name for expert in self.experts() if not expert.has_gate]

    def write(self, name: str, fill: Callable[[Path], None], card: dict[str, Any], replace: bool = True) -> Expert:
        """Add or replace an expert, whole or not at all.

        Args:
            fill: writes ``adapter_config.json``, ``adapter_model.safetensors`` and perhaps ``gate.safetensors``
                into the folder that it is given.
            card: what the card says besides the files' hashes and a summary, which are added.
            replace: put it in the place of an expert of that name.

        Raises:
            GliderError: the name is not allowed, or what ``fill`` wrote cannot be routed.
            FileExistsError: ``replace`` is false and there is an expert of that name, maybe of another process.
        """
        check_name(name)
        target = self.path / "experts" / name
        with replacing_folder(target, replace) as folder:
            fill(folder)
            summary = inspect_adapter(folder).summary()
            files = {file: sha256(folder / file) for file in EXPERT_FILES if (folder / file).exists()}
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

        Args:
            adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors``, A ``[r, d_in]`` and B
                ``[d_out, r]`` for each site.
            gate: safetensors file of ``{site: v [d_in]}`` fp32 with every site of the adapter; None: no gate.
            card: what the card says besides hashes and a summary.

        Raises:
            GliderError: the name is taken or not allowed, the adapter cannot be routed, or its shapes differ
                from the base's; the gate lacks a site, does not fit or is not finite.
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
    path = Path(base).expanduser()
    # Not resolved: the hub's cache links NAME.gguf to a file without a suffix.
    return str(path.absolute()) if base != OFFLINE_DEFAULT and path.exists() else base
