"""The index of the global router: the embedded descriptions of every expert, and their file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from glider_dist.errors import GliderError
from glider_dist.pool.files import replacing, save_tensors
from glider_dist.semantics.embedder import TextEmbedder, same_model

if TYPE_CHECKING:
    from glider_dist.config import Config

FILE = "embeddings.safetensors"
PROBES = 3  # descriptions that are embedded again to recognise a model without a fingerprint


@dataclass(frozen=True)
class Index:
    """Embedded descriptions.

    Attributes:
        names: the experts, in the pool's order.
        embeddings: ``[N, D]`` fp32, L2-normalised, one row per description.
        owner: ``[N]`` int64, the expert of each row.
        embedder: id of the model that made them.
        texts: sha256 of the names and descriptions.
        fingerprint: of the model's weights; empty if it is not known.
        query_prefix, description_prefix: what was put before descriptions, and is to be put before queries.
        pooling: ``max`` or ``mean`` over an expert's descriptions.
        rows: ``[N, 32]`` uint8, sha256 of each row's text; what was embedded once is found again by it.
    """

    names: tuple[str, ...]
    embeddings: torch.Tensor
    owner: torch.Tensor
    embedder: str
    texts: str
    fingerprint: str = ""
    query_prefix: str = ""
    description_prefix: str = ""
    pooling: str = "max"
    rows: torch.Tensor | None = None

    def similarity(self, queries_BD: torch.Tensor) -> torch.Tensor:
        """Cosine of each query with each expert's descriptions, the largest or their mean; ``[B, E]``.

        Raises:
            GliderError: if the queries were embedded with another dimension.
        """
        if queries_BD.shape[1] != self.embeddings.shape[1]:
            raise GliderError(
                f"the query's embedding has {queries_BD.shape[1]} dimensions, "
                f"the index {self.embeddings.shape[1]} "
                f"(made with {self.embedder}); use the same embedder or run index again"
            )
        cosines_BN = queries_BD @ self.embeddings.t()
        if self._one_each:
            return cosines_BN
        result_BE = torch.full((len(queries_BD), len(self.names)), float("-inf"))
        owner_BN = self.owner.expand(len(queries_BD), -1)
        reduce = "amax" if self.pooling == "max" else "mean"
        return result_BE.scatter_reduce(1, owner_BN, cosines_BN, reduce, include_self=False)

    @cached_property
    def _one_each(self) -> bool:
        return torch.equal(self.owner, torch.arange(len(self.names)))


@dataclass(frozen=True)
class IndexSettings:
    """How descriptions become an index; see :class:`Index`."""

    query_prefix: str = ""
    description_prefix: str = ""
    pooling: str = "max"


def index_settings(cfg: Config) -> IndexSettings:
    return IndexSettings(
        cfg.service.query_prefix or "", cfg.service.description_prefix or "", cfg.describe.pooling
    )


def texts_digest(descriptions: dict[str, list[str]]) -> str:
    return hashlib.sha256(json.dumps(list(descriptions.items())).encode()).hexdigest()


def check_model(index: Index, embedder: TextEmbedder, texts: Sequence[str], vectors_ND: torch.Tensor) -> None:
    """Compare fingerprints; where one of the two is not known, embed some texts again and compare the vectors.

    Args:
        texts: N of the texts that were embedded for the index, prefix included.
        vectors_ND: what the index has for them.

    Raises:
        GliderError: the embedder is not the model that made the index.
    """
    advice = "use the same model or run index again"
    found = embedder.fingerprint()
    if found is not None and index.fingerprint:
        if found != index.fingerprint:
            raise GliderError(
                "the embedder's weights or settings are not those that made the index, or another version of "
                f"glider_dist made it; {advice}"
            )
        return
    again = embedder.embed(texts[:PROBES])
    if again.shape[1] != vectors_ND.shape[1]:
        raise GliderError(
            f"the embedder's vectors have {again.shape[1]} dimensions, those of the index "
            f"{vectors_ND.shape[1]}; {advice}"
        )
    if not same_model(again, vectors_ND[:PROBES]):
        raise GliderError(f"the embedder's vectors of the pool's descriptions are unlike the index; {advice}")


def save_index(index: Index, path: Path) -> None:
    """Write the index, atomically."""
    metadata = {
        "names": json.dumps(index.names),
        "embedder": index.embedder,
        "texts": index.texts,
        "fingerprint": index.fingerprint,
        "query_prefix": index.query_prefix,
        "description_prefix": index.description_prefix,
        "pooling": index.pooling,
    }
    tensors = {"embeddings": index.embeddings.contiguous(), "owner": index.owner}
    if index.rows is not None:
        tensors["rows"] = index.rows
    with replacing(path) as temporary:
        save_tensors(tensors, temporary, metadata)


def read_index(path: Path) -> Index:
    """Read an index as it is.

    Raises:
        GliderError: if it is missing or damaged.
    """
    if not path.exists():
        raise GliderError(f"{path} does not exist; run index first")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            return Index(
                tuple(json.loads(metadata["names"])),
                file.get_tensor("embeddings"),
                file.get_tensor("owner"),
                metadata["embedder"],
                metadata["texts"],
                metadata.get("fingerprint", ""),
                metadata.get("query_prefix", ""),
                metadata.get("description_prefix", ""),
                metadata.get("pooling", "max"),
                file.get_tensor("rows") if "rows" in file.keys() else None,  # noqa: SIM118
            )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise GliderError(f"{path} cannot be read ({error}); run index again") from None


def load_index(path: Path, names: Sequence[str], descriptions: dict[str, list[str]] | None = None) -> Index:
    """Read the index and check that it belongs to the experts of the pool as it is now.

    Raises:
        GliderError: if it is missing, made for other experts or for descriptions that have changed since.
    """
    index = read_index(path)
    if index.names != tuple(names):
        odd = sorted(set(index.names) ^ set(names))
        raise GliderError(
            f"{path} was made for other experts ({odd[0] if odd else 'another order'}); run index again"
        )
    if descriptions is not None and index.texts != texts_digest(descriptions):
        raise GliderError(f"{path} was made from descriptions that have changed since; run index again")
    return index
