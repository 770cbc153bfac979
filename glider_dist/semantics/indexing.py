"""The stage ``index``: embedding the descriptions of every expert, those that no earlier index holds."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from glider_dist.errors import GliderError
from glider_dist.semantics.client import Unreachable
from glider_dist.semantics.describe import descriptions_of
from glider_dist.semantics.embedder import TextEmbedder
from glider_dist.semantics.global_router import GlobalRouter
from glider_dist.semantics.index import (
    FILE,
    PROBES,
    Index,
    IndexSettings,
    check_model,
    index_settings,
    read_index,
    save_index,
    texts_digest,
)
from glider_dist.tracking.progress import progress

if TYPE_CHECKING:
    from glider_dist.job import Job

log = logging.getLogger(__name__)
_AT_ONCE = 1024
"""Experts whose descriptions are embedded between two looks at a wish to stop."""


def run(job: Job) -> None:
    """Embed the descriptions of the pool, unless its index already holds exactly these.

    A job that is to stop keeps what it has embedded in ``run_dir/index.safetensors``.
    """
    pool = job.open_pool(check_base=False)
    if not pool.names:
        raise GliderError(f"pool {pool.path} holds no experts")
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
            try:
                index = read_index(old)
            except GliderError:
                continue
            known |= known_vectors(index, embedder, wanted)
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


def known_vectors(index: Index, embedder: TextEmbedder, texts: Sequence[str]) -> dict[bytes, torch.Tensor]:
    """``{sha256 of a text: its vector}`` of an index, if the same model made it; else nothing.

    Args:
        texts: what is wanted now, prefix included; by some of them a model without a fingerprint is recognised.
    """
    found = _vectors_by_text(index)
    shared = [text for text in texts if _text_digest(text) in found][:PROBES]
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
