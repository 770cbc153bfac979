"""What must agree between a pool, its experts and the base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from glider_dist.errors import GliderError
from glider_dist.pool.names import natural_key


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


def check_sites(name: str, shapes: dict[str, tuple[int, int]], known: dict[str, tuple[int, int]]) -> None:
    """Raises GliderError if an expert adapts a site that the base lacks or with another shape."""
    for site, shape in shapes.items() if known else ():
        if site not in known:
            raise GliderError(f"expert {name!r} adapts {site}, which is not a linear layer of the base")
        if shape != known[site]:
            raise GliderError(f"expert {name!r} has shape {shape} at {site}, but the base has {known[site]}")


def check_gate(name: str, gate: dict[str, torch.Tensor], shapes: dict[str, tuple[int, int]]) -> None:
    """Raises GliderError unless the gate has one finite vector of length d_in for each of the expert's sites."""
    for site, (_, d_in) in shapes.items():
        if site not in gate:
            raise GliderError(f"the gate of expert {name!r} lacks site {site}; train it again")
        if tuple(gate[site].shape) != (d_in,):
            raise GliderError(
                f"the gate of expert {name!r} at {site} has shape {list(gate[site].shape)}, not [{d_in}]"
            )
        if not torch.isfinite(gate[site]).all():
            raise GliderError(f"the gate of expert {name!r} is not finite at {site}; train it again")
