"""The index of the global router, and the stage ``index``: the embedded descriptions of every expert."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from glider_dist.errors import GliderError
from glider_dist.pool import ExpertPool
from glider_dist.pool.files import replacing
from glider_dist.semantics.describe import descriptions_of
from glider_dist.semantics.embedder import Embedder

if TYPE_CHECKING:
    from glider_dist.job import Job

log = logging.getLogger(__name__)
FILE = "embeddings.safetensors"


@dataclass(frozen=True)
class Index:
    """Embedded descriptions.

    Attributes:
        names: the experts, in the pool's order.
        embeddings: ``[N, D]`` fp32, L2-normalised, one row per description.
        owner: ``[N]`` int64, the expert of each row.
        embedder: id of the model that made them.
        texts: sha256 of the names and descriptions.
    """

    names: tuple[str, ...]
    embeddings: torch.Tensor
    owner: torch.Tensor
    embedder: str
    texts: str

    def similarity(self, queries_BD: torch.Tensor) -> torch.Tensor:
        """Cosine of each query with each expert's nearest description; ``[B, E]``.

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
        best_BE = torch.full((len(queries_BD), len(self.names)), float("-inf"))
        owner_BN = self.owner.expand(len(queries_BD), -1)
        return best_BE.scatter_reduce(1, owner_BN, cosines_BN, "amax")


def texts_digest(descriptions: dict[str, list[str]]) -> str:
    return hashlib.sha256(json.dumps(list(descriptions.items())).encode()).hexdigest()


def build_index(descriptions: dict[str, list[str]], embedder: Embedder) -> Index:
    """Embed ``{expert: descriptions}``.

    Raises:
        GliderError: if an expert has no description.
    """
    for name, texts in descriptions.items():
        if not texts:
            raise GliderError(f"expert {name!r} has no description; run describe first")
    owner = [index for index, texts in enumerate(descriptions.values()) for _ in texts]
    vectors = embedder.embed([text for texts in descriptions.values() for text in texts])
    return Index(tuple(descriptions), vectors, torch.tensor(owner), embedder.name, texts_digest(descriptions))


def save_index(index: Index, path: Path) -> None:
    """Write the index, atomically."""
    metadata = {"names": json.dumps(index.names), "embedder": index.embedder, "texts": index.texts}
    tensors = {"embeddings": index.embeddings.contiguous(), "owner": index.owner}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_index(path: Path, names: Sequence[str], descriptions: dict[str, list[str]] | None = None) -> Index:
    """Read the index and check that it belongs to the experts of the pool as it is now.

    Raises:
        GliderError: if it is missing, made for other experts or for descriptions that have changed since.
    """
    if not path.exists():
        raise GliderError(f"{path} does not exist; run index first")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            index = Index(
                tuple(json.loads(metadata["names"])),
                file.get_tensor("embeddings"),
                file.get_tensor("owner"),
                metadata["embedder"],
                metadata["texts"],
            )
    except (SafetensorError, KeyError, TypeError) as error:
        raise GliderError(f"{path} cannot be read ({error}); run index again") from None
    if index.names != tuple(names):
        odd = sorted(set(index.names) ^ set(names))
        raise GliderError(
            f"{path} was made for other experts ({odd[0] if odd else 'another order'}); run index again"
        )
    if descriptions is not None and index.texts != texts_digest(descriptions):
        raise GliderError(f"{path} was made from descriptions that have changed since; run index again")
    return index


class GlobalRouter:
    """Similarity of queries to the experts of a pool: its index and an embedder together.

    Raises:
        GliderError: if the index is missing, stale, or made with another embedder.
    """

    def __init__(self, pool: ExpertPool, embedder: Embedder):
        self.index = load_index(pool.router_dir / FILE, pool.names, descriptions_of(pool))
        if self.index.embedder != embedder.name:
            raise GliderError(
                f"the index was made with embedder {self.index.embedder!r}, this run uses {embedder.name!r}; "
                "use the same one or run index again"
            )
        self.embedder = embedder

    def similarity(self, queries: Sequence[str]) -> torch.Tensor:
        """Cosines ``[len(queries), E]`` fp32 on the CPU."""
        if not queries:
            return torch.zeros(0, len(self.index.names))
        return self.index.similarity(self.embedder.embed(queries))


def run(job: Job) -> None:
    """Embed the descriptions of the pool, unless its index already holds exactly these."""
    pool = job.open_pool(check_base=False)
    if not pool.names:
        raise GliderError(f"pool {pool.path} holds no experts")
    embedder = Embedder(job.cfg.embedder)
    descriptions = descriptions_of(pool)

    def work() -> None:
        try:
            GlobalRouter(pool, embedder)
            log.info("the index is up to date")
        except GliderError:
            made = build_index(descriptions, embedder)
            save_index(made, pool.router_dir / FILE)
            job.run.log({"index/descriptions": len(made.owner)})
            log.info("indexed %d descriptions of %d experts", len(made.owner), len(pool))

    job.ranks.on_main(work)
