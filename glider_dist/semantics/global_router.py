"""The global router: how near each query is to the descriptions of each expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from glider_dist.errors import GliderError
from glider_dist.pool import ExpertPool
from glider_dist.semantics.describe import descriptions_of
from glider_dist.semantics.embedder import TextEmbedder
from glider_dist.semantics.index import FILE, IndexSettings, load_index

_PROBES = 3  # descriptions that are embedded again to recognise a model without a fingerprint
_SAME_MODEL = 0.995  # cosine; bfloat16 on the other side costs less than 0.002


class GlobalRouter:
    """Similarity of queries to the experts of a pool: its index and an embedder together.

    Args:
        settings: prefixes and pooling that this run asks for; None takes the index's own.

    Raises:
        GliderError: if the index is missing, stale, or made with another embedder or other prefixes.
    """

    def __init__(self, pool: ExpertPool, embedder: TextEmbedder, settings: IndexSettings | None = None):
        self._descriptions = descriptions_of(pool)
        self.index = load_index(pool.router_dir / FILE, pool.names, self._descriptions)
        if self.index.embedder != embedder.name:
            raise GliderError(
                f"the index was made with embedder {self.index.embedder!r}, this run uses {embedder.name!r}; "
                "use the same one or run index again"
            )
        for key, value in vars(settings).items() if settings is not None else ():
            if value != getattr(self.index, key):
                raise GliderError(
                    f"the index was made with {key}={getattr(self.index, key)!r}, this run asks for {value!r}; "
                    "run index again"
                )
        self.embedder = embedder
        self._checked = False

    def similarity(self, queries: Sequence[str]) -> torch.Tensor:
        """Cosines ``[len(queries), E]`` fp32 on the CPU.

        Raises:
            GliderError: the embedder is not the model that made the index.
        """
        if not queries:
            return torch.zeros(0, len(self.index.names))
        if not self._checked:
            self.check_embedder()
            self._checked = True
        return self.index.similarity(self.embedder.embed([self.index.query_prefix + query for query in queries]))

    def check_embedder(self) -> None:
        """Compare fingerprints; where an endpoint has none, embed a description again and compare the vectors.

        Raises:
            GliderError: the embedder is not the model that made the index.
        """
        found = self.embedder.fingerprint()
        advice = "use the same model or run index again"
        if found is not None:
            if self.index.fingerprint and found != self.index.fingerprint:
                raise GliderError(f"the embedder's weights are not those that made the index; {advice}")
            return
        texts = [text for texts in self._descriptions.values() for text in texts][:_PROBES]
        again = self.embedder.embed([self.index.description_prefix + text for text in texts])
        stored = self.index.embeddings[: len(texts)]
        if again.shape != stored.shape:
            raise GliderError(
                f"the endpoint's embeddings have {again.shape[1]} dimensions, the index {stored.shape[1]}; "
                + advice
            )
        least = float((again * stored).sum(1).min())
        if least < _SAME_MODEL:
            raise GliderError(
                f"the endpoint embeds the pool's descriptions unlike the index does (cosine {least:.3f}); {advice}"
            )
