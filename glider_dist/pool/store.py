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
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from glider_dist.errors import GliderError
from glider_dist.pool.adapter import (
    CARD_FILE,
    CONFIG_FILE,
    GATE_FILE,
    WEIGHTS_FILE,
    SiteLora,
    read_adapter,
    read_config,
    read_gate,
    site_shapes,
)
from glider_dist.pool.files import read_json, replacing_folder, sha256, write_json, write_tensors
from glider_dist.pool.names import check_name, natural_key

FORMAT = 1


@dataclass(frozen=True)
class Fingerprint:
    """What must agree between a pool and the base it is attached to.

    Attributes:
        model_type: the Hugging Face model type, such as ``llama``.
        sites: ``{site: (d_out, d_in)}`` of every linear layer that experts may adapt; may be empty if unknown.
        weights: sha256 over the base's weight files, or None if unknown.
    """

    model_type: str | None = None
    sites: dict[str, tuple[int, int]] = field(default_factory=dict)
    weights: str | None = None

    def to_json(self) -> dict[str, Any]:
        sites = {site: list(shape) for site, shape in self.sites.items()}
        return {"model_type": self.model_type, "weights_sha256": self.weights, "sites": sites}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Fingerprint:
        sites = {site: (int(out), int(in_)) for site, (out, in_) in value.get("sites", {}).items()}
        return Fingerprint(value.get("model_type"), sites, value.get("weights_sha256"))

    def difference(self, other: Fingerprint) -> str | None:
        """The first difference between what both sides know, in words, or None."""
        if self.model_type and other.model_type and self.model_type != other.model_type:
            return f"model type {self.model_type} against {other.model_type}"
        if self.sites and other.sites:
            for site in sorted(self.sites.keys() | other.sites.keys(), key=natural_key):
                mine, theirs = self.sites.get(site), other.sites.get(site)
                if mine != theirs:
                    return f"site {site}: shape {mine} against {theirs}"
        if self.weights and other.weights and self.weights != other.weights:
            return f"weights {self.weights[:12]} against {other.weights[:12]}"
        return None


class Expert:
    """A handle on one expert's folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = folder.name

    @property
    def has_gate(self) -> bool:
        return (self.folder / GATE_FILE).exists()

    def card(self) -> dict[str, Any]:
        path = self.folder / CARD_FILE
        return read_json(path) if path.exists() else {}

    def config(self) -> dict[str, Any]:
        return read_config(self.folder)

    def weights(self) -> dict[str, SiteLora]:
        """``{site: SiteLora}``, read from disk."""
        return read_adapter(self.folder)

    def gate(self) -> dict[str, torch.Tensor]:
        """Raw gate vectors ``{site: v [d_in]}``, read from disk."""
        return read_gate(self.folder / GATE_FILE)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """``{site: (d_out, d_in)}`` from the file's header."""
        return site_shapes(self.folder)

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

        Raises:
            GliderError: if the folder holds a pool for another base.
        """
        root = Path(path)
        if fingerprint is None:
            config = Path(base) / "config.json"
            fingerprint = Fingerprint(read_json(config).get("model_type")) if config.exists() else Fingerprint()
        if (root / "pool.json").exists():
            pool = ExpertPool.open(root)
            pool.check_base(fingerprint)
            return pool
        (root / "experts").mkdir(parents=True, exist_ok=True)
        write_json(root / "pool.json", {"format": FORMAT, "base": base, "fingerprint": fingerprint.to_json()})
        return ExpertPool(root, base, fingerprint)

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
        return ExpertPool(root, value["base"], Fingerprint.from_json(value.get("fingerprint", {})))

    def check_base(self, other: Fingerprint) -> None:
        """Raises GliderError if ``other`` is not the base this pool was made for."""
        difference = self.fingerprint.difference(other)
        if difference:
            raise GliderError(f"pool {self.path} was made for another base ({self.base}): {difference}")

    @property
    def router_dir(self) -> Path:
        return self.path / "router"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The experts in natural order; this order numbers them everywhere. Read once per open pool."""
        root = self.path / "experts"
        # A copy of an empty pool may lack the empty folder.
        entries = os.scandir(root) if root.is_dir() else ()
        found = (entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
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

    def write(self, name: str, fill: Callable[[Path], None], card: dict[str, Any]) -> Expert:
        """Add or replace an expert: ``fill(folder)`` writes its files, the card gets their hashes."""
        check_name(name)
        target = self.path / "experts" / name
        with replacing_folder(target) as folder:
            fill(folder)
            read_adapter(folder)
            files = {
                file: sha256(folder / file)
                for file in (CONFIG_FILE, WEIGHTS_FILE, GATE_FILE)
                if (folder / file).exists()
            }
            write_json(folder / CARD_FILE, {"name": name, **card, "files": files})
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
        if name in self:
            raise GliderError(
                f"pool {self.path} already has an expert {name!r}; remove it first or choose another name"
            )
        source = Path(adapter)
        shapes = {site: (lora.B.shape[0], lora.A.shape[1]) for site, lora in read_adapter(source).items()}
        check_sites(name, shapes, self.fingerprint.sites)
        if gate is not None:
            check_gate(name, read_gate(Path(gate)), shapes)

        def fill(folder: Path) -> None:
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(source / file, folder / file)
            if gate is not None:
                shutil.copyfile(gate, folder / GATE_FILE)

        return self.write(name, fill, card or {})


def check_sites(name: str, shapes: dict[str, tuple[int, int]], known: dict[str, tuple[int, int]]) -> None:
    """Raises GliderError if an expert adapts a site that the base lacks or with another shape."""
    for site, shape in shapes.items() if known else ():
        if site not in known:
            raise GliderError(f"expert {name!r} adapts {site}, which is not a linear layer of the base")
        if shape != known[site]:
            raise GliderError(f"expert {name!r} has shape {shape} at {site}, but the base has {known[site]}")


def check_gate(name: str, gate: dict[str, torch.Tensor], shapes: dict[str, tuple[int, int]]) -> None:
    """Raises GliderError unless the gate has one vector of length d_in for each of the expert's sites."""
    for site, (_, d_in) in shapes.items():
        if site not in gate:
            raise GliderError(f"the gate of expert {name!r} lacks site {site}; train it again")
        if tuple(gate[site].shape) != (d_in,):
            raise GliderError(
                f"the gate of expert {name!r} at {site} has shape {list(gate[site].shape)}, not [{d_in}]"
            )
