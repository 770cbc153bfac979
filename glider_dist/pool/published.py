"""Checkpoints as the authors of PHATGOOSE and GLIDER publish them, and old pickled adapters, read safely.

One file holds many experts, told apart by an index i. Three layouts, with A ``[r, d_in]`` and B ``[d_out, r]``:

GLIDER, a pool: ``SITE.lora_experts.default.i.lora_A.weight``, ``...lora_B.weight``, and the gates of all experts
as the rows of ``SITE.lora_gate.default.weight [E, d_in]``.

GLIDER, one expert: ``SITE.lora_A.default.weight``, ``SITE.lora_B.default.weight``, and its gate
``SITE.lora_gate.default [d_in]``.

PHATGOOSE: ``SITE._addons.expert_lora.layer1__i [d_in, r]``, ``...layer2__i [r, d_out]``,
``SITE._addons.router.expert_embeddings__i [d_in]``.

All scale ``B A`` by 1 / r, which is lora_alpha = 1. Sources: src/utils/manipulation.py and
src/peft/tuners/molora/layers.py of UNITES-Lab/glider, scripts/concatenate.py of r-three/phatgoose.
"""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from glider_dist.errors import GliderError, first_line
from glider_dist.pool.adapter import GATE_FILE, AdapterInfo, pair_up, target_modules, write_adapter
from glider_dist.pool.files import sha256, write_tensors
from glider_dist.pool.header import info_of

log = logging.getLogger(__name__)
SUFFIXES = (".pt", ".pth", ".bin")
_PREFIX = r"(?:base_model\.model\.)?(?P<site>.+?)"
_HALVES = (
    re.compile(_PREFIX + r"\.lora_experts\.[^.]+\.(?P<index>\d+)\.lora_(?P<which>[AB])\.weight"),
    re.compile(_PREFIX + r"\.lora_(?P<which>[AB])\.[^.]+\.weight"),
    re.compile(_PREFIX + r"(?:\._addons)?\.expert_lora\.layer(?P<which>[12])__(?P<index>\d+)"),
)
_GATES = (
    re.compile(_PREFIX + r"\.lora_gate\.[^.]+(?:\.weight)?"),
    re.compile(_PREFIX + r"(?:\._addons)?\.router\.expert_embeddings__(?P<index>\d+)"),
)


@dataclass(frozen=True)
class PublishedExpert:
    """One expert of a checkpoint: ``weights {site: (A, B)}``, ``gates {site: v [d_in]}``, empty if it has none."""

    name: str
    origin: str
    hashes: dict[str, str]
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
    gates: dict[str, torch.Tensor]
    base: str | None = None
    readme_folder: Path | None = None

    @cached_property
    def info(self) -> AdapterInfo:
        tensors = {}
        for site, (a, b) in self.weights.items():
            tensors[f"{site}.lora_A.weight"], tensors[f"{site}.lora_B.weight"] = info_of(a), info_of(b)
        return pair_up(tensors, self.origin)

    def gate(self) -> dict[str, torch.Tensor] | None:
        return self.gates or None

    def sha256(self) -> dict[str, str]:
        return self.hashes

    def card(self) -> dict[str, Any]:
        return {}

    def fill(self, folder: Path, base: str, known: Mapping[str, Any]) -> None:
        """Write the expert as a PEFT folder, its gate beside it."""
        task_type = "SEQ_2_SEQ_LM" if any(site.startswith("decoder.") for site in self.weights) else "CAUSAL_LM"
        targets = target_modules(self.weights, known)
        write_adapter(folder, self.weights, 1.0, targets, base, task_type)
        if self.gates:
            write_tensors(folder / GATE_FILE, self.gates)


def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that torch.save wrote; nothing but tensors is ever unpickled.

    Raises:
        GliderError: it is missing, broken, or holds anything else.
    """
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise GliderError(
            f"{path} is broken or holds more than tensors, so it is not loaded ({first_line(error)})"
        ) from None
    if not isinstance(value, dict):
        raise GliderError(f"{path} holds a {type(value).__name__}, not named tensors")
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise GliderError(f"{path} holds {key!r}, which is no named tensor; save the state dict alone")
    return value


def read_published(path: Path, name: str) -> list[PublishedExpert]:
    """The experts of a published checkpoint: ``name`` if it holds one without an index, else ``name_0`` and so on.

    Raises:
        GliderError: the file cannot be loaded, or none of its keys belongs to an expert.
    """
    weights: dict[int | None, dict[str, dict[str, torch.Tensor]]] = {}
    gates: dict[int | None, dict[str, torch.Tensor]] = {}
    rest = 0
    for key, tensor in load_pickled(path).items():
        if half := _first(_HALVES, key):
            index, site, which = _index(half), half["site"], half["which"]
            matrix = tensor.t() if which in "12" else tensor
            weights.setdefault(index, {}).setdefault(site, {})["A" if which in "A1" else "B"] = matrix
        elif gate := _first(_GATES, key):
            # The rows of a pool's gate are its experts.
            rows = dict(enumerate(tensor)) if tensor.ndim == 2 else {_index(gate): tensor}
            for row, vector in rows.items():
                gates.setdefault(row, {})[gate["site"]] = vector
        else:
            rest += 1
    if not weights:
        raise GliderError(
            f"{path} has no keys of a published pool, such as ...lora_experts.default.0.lora_A.weight or "
            "...expert_lora.layer1__0; a PEFT adapter is imported by its folder"
        )
    if rest:
        log.info("%s: %d tensors are no expert's (the base's own weights) and stay out", path, rest)
    digest = sha256(path)
    found = []
    for index in sorted(weights, key=lambda index: -1 if index is None else index):
        label = name if index is None else f"{name}_{index}"
        for site, pair in weights[index].items():
            if set(pair) != {"A", "B"}:
                raise GliderError(f"{path}: expert {label} has only one of A and B at {site}")
        pairs = {site: (pair["A"], pair["B"]) for site, pair in weights[index].items()}
        hashes = {path.name: digest} if index is None else {f"{path.name}#{index}": digest}
        found.append(PublishedExpert(label, str(path), hashes, pairs, gates.get(index, {})))
    return found


def _first(patterns: tuple[re.Pattern[str], ...], key: str) -> re.Match[str] | None:
    return next((match for pattern in patterns if (match := pattern.fullmatch(key))), None)


def _index(match: re.Match[str]) -> int | None:
    index = match.groupdict().get("index")
    return None if index is None else int(index)
