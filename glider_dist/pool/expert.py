"""One expert of a pool: its files, read when they are asked for, and its card."""

from __future__ import annotations

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
from glider_dist.pool.files import read_json, sha256, write_json, write_tensors


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
        return GATE_FILE in card.get("files", {}) and (self.folder / GATE_FILE).exists()

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
        if not all(isinstance(card.get(key, {}), dict) for key in ("files", "summary")):
            raise GliderError(f"{path} is no card of an expert; {again}")
        return card

    def config(self) -> dict[str, Any]:
        """PEFT's settings of the LoRA: ``adapter_config.json`` as it is.

        Raises:
            GliderError: it is missing or broken, asks for what cannot be routed, or is a link
                that leaves the pool.
        """
        return read_config(self._inside(CONFIG_FILE).parent)

    def weights(self) -> dict[str, SiteLora]:
        """``{site: SiteLora}`` in the file's dtypes, on the CPU, read from disk.

        Raises:
            GliderError: see :func:`~glider_dist.pool.adapter.read_adapter`.
        """
        return read_adapter(self._inside(CONFIG_FILE, WEIGHTS_FILE).parent)

    def gate(self) -> dict[str, torch.Tensor]:
        """Raw gate vectors ``{site: v [d_in]}`` fp32, read from disk.

        Raises:
            GliderError: there is none, or it is broken.
        """
        return read_gate(self._inside(GATE_FILE))

    def shapes(self) -> dict[str, tuple[int, int]]:
        """``{site: (d_out, d_in)}`` from the file's header."""
        return site_shapes(self._inside(WEIGHTS_FILE).parent)

    def summary(self, card: dict[str, Any]) -> dict[str, Any]:
        """Sites, ranks, dtype and bytes as its ``card`` has them, else from the headers."""
        return card.get("summary") or inspect_adapter(self.folder).summary()

    def update_card(self, **values: Any) -> None:
        """Set keys of the card, whose others stay; of two processes that do so at once one may lose.

        Args:
            values: what JSON can hold, by key.

        Raises:
            GliderError: as :meth:`card`.
        """
        write_json(self.folder / CARD_FILE, {**self.card(), **values})

    def write_gate(self, gate: dict[str, torch.Tensor], **card: Any) -> None:
        """Store the gate and then note its hash in the card, which makes it a finished one.

        Args:
            gate: ``{site: v [d_in]}`` fp32, one for each site that the expert adapts; not checked here.
            card: keys to set in the card besides.

        Raises:
            GliderError: as :meth:`card`.
        """
        path = self.folder / GATE_FILE
        write_tensors(path, gate)
        files = {**self.card().get("files", {}), GATE_FILE: sha256(path)}
        self.update_card(**card, files=files)
