"""The index of the global router, and the stage ``index``: the embedded descriptions of every expert."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from glider_dist.errors import GliderError
from glider_dist.pool.files import replacing, save_tensors
from glider_dist.semantics.client import Unreachable
from glider_dist.semantics.describe import descriptions_of
from glider_dist.semantics.embedder import TextEmbedder, same_model
from glider_dist.tracking.progress import progress

if TYPE_CHECKING:
    from glider_dist.config import Config
    from glider_dist.job import Job

log = logging.getLogger(__name__)
FILE = "embeddings.safetensors"
_PROBES = 3  # descriptions that are embedded again to recognise a model without a fingerprint
_AT_ONCE = 1024
"""Experts whose descriptions are embedded between two looks at a wish to stop."""


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


def _text_digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _prefixed(descriptions: dict[str, list[str]], settings: IndexSettings) -> list[str]:
    return [settings.description_prefix + text for texts in descriptions.values() for text in texts]


def build_index(
    descriptions: dict[str, list[str]],
    embedder: TextEmbedder,
    settings: IndexSettings | None = None,
    known: Mapping[bytes, torch.Tensor] = MappingProxyType({}),
) -> tuple[Index, int]:
    """Embed ``{expert: descriptions}``.

    Args:
        known: :func:`known_vectors` of earlier indexes; what is in there is not embedded again.

    Returns:
        The index and how many texts were embedded for it.

    Raises:
        GliderError: if an expert has no description.
    """
    settings = settings or IndexSettings()
    for name, texts in descriptions.items():
        if not texts:
            raise GliderError(f"expert {name!r} has no description; run describe first")
    owner = [index for index, texts in enumerate(descriptions.values()) for _ in texts]
    texts = _prefixed(descriptions, settings)
    digests = [_text_digest(text) for text in texts]
    new = {digest: text for digest, text in zip(digests, texts, strict=True) if digest not in known}
    vectors = dict(zip(new, embedder.embed(list(new.values())), strict=True))
    index = Index(
        tuple(descriptions),
        torch.stack([known[digest] if digest in known else vectors[digest] for digest in digests]),
        torch.tensor(owner),
        embedder.name,
        texts_digest(descriptions),
        embedder.fingerprint() or "",
        settings.query_prefix,
        settings.description_prefix,
        settings.pooling,
        torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(len(digests), 32),
    )
    return index, len(new)


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
    again = embedder.embed(texts[:_PROBES])
    if again.shape[1] != vectors_ND.shape[1]:
        raise GliderError(
            f"the embedder's vectors have {again.shape[1]} dimensions, those of the index "
            f"{vectors_ND.shape[1]}; {advice}"
        )
    if not same_model(again, vectors_ND[:_PROBES]):
        raise GliderError(f"the embedder's vectors of the pool's descriptions are unlike the index; {advice}")


def known_vectors(index: Index, embedder: TextEmbedder, texts: Sequence[str]) -> dict[bytes, torch.Tensor]:
    """``{sha256 of a text: its vector}`` of an index, if the same model made it; else nothing.

    Args:
        texts: what is wanted now, prefix included; by some of them a model without a fingerprint is recognised.
    """
    found = _vectors_by_text(index)
    shared = [text for text in texts if _text_digest(text) in found][:_PROBES]
    if not shared or index.embedder != embedder.name:
        return {}
    try:
        check_model(index, embedder, shared, torch.stack([found[_text_digest(text)] for text in shared]))
    except Unreachable:
        raise
    except GliderError:
        return {}
    return found


def _vectors_by_text(index: Index) -> dict[bytes, torch.Tensor]:
    if index.rows is None:
        return {}
    return {row.tobytes(): vector for row, vector in zip(index.rows.numpy(), index.embeddings, strict=True)}


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


def run(job: Job) -> None:
    """Embed the descriptions of the pool, unless its index already holds exactly these.

    A job that is to stop keeps what it has embedded in ``run_dir/index.safetensors``.
    """
    pool = job.open_pool(check_base=False)
    if not pool.names:
        raise GliderError(f"pool {pool.path} holds no experts")
    from glider_dist.semantics.global_router import GlobalRouter

    embedder, settings = job.embedder, index_settings(job.cfg)
    descriptions = descriptions_of(pool)
    path, kept = pool.router_dir / FILE, job.run_dir / "index.safetensors"
    broke_off = False

    def work() -> None:
        nonlocal broke_off
        try:
            GlobalRouter(pool, embedder, settings).check_embedder()
            log.info("the index is up to date")
            return
        except Unreachable:
            raise
        except GliderError as error:
            log.debug("the index is made: %s", error)
        known: dict[bytes, torch.Tensor] = {}
        wanted = _prefixed(descriptions, settings)
        for old in (path, kept):
            with contextlib.suppress(GliderError):
                known |= known_vectors(read_index(old), embedder, wanted)
        names, embedded = list(descriptions), 0
        for end in progress(range(_AT_ONCE, len(names) + _AT_ONCE, _AT_ONCE), desc="experts", enabled=True):
            part = {name: descriptions[name] for name in names[:end]}
            made, new = build_index(part, embedder, settings, known)
            embedded += new
            if len(part) < len(names):
                known |= _vectors_by_text(made)
                if new and job.stop.wished:
                    save_index(made, kept)
                    broke_off = True
                    return
        save_index(made, path)
        kept.unlink(missing_ok=True)
        job.run.log({"index/descriptions": len(made.owner), "index/embedded": embedded})
        log.info("indexed %d descriptions of %d experts, %d of them new", len(made.owner), len(pool), embedded)

    job.ranks.on_main(work)
    job.stop.agree(broke_off)
