"""The global router: how near each query is to the descriptions of each expert."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from glider_dist.errors import GliderError
from glider_dist.pool import ExpertPool
from glider_dist.semantics.chat import model_of
from glider_dist.semantics.chat_descriptions import QueryDescriber
from glider_dist.semantics.describe import descriptions_of
from glider_dist.semantics.embedder import TextEmbedder
from glider_dist.semantics.index import FILE, IndexSettings, check_model, index_settings, load_index

if TYPE_CHECKING:
    from glider_dist.job import Job


class GlobalRouter:
    """Similarity of queries to the experts of a pool: its index and an embedder together.

    Args:
        settings: prefixes and pooling that this run asks for; None takes the index's own.
        describer: writes the descriptions of queries; None embeds the queries themselves.

    Attributes:
        descriptions: ``{expert: sentences}`` in the pool's order.
        seconds: time spent so far on descriptions, embeddings and scores.

    Raises:
        GliderError: if the index is missing, stale, or made with another embedder or other prefixes.
    """

    def __init__(
        self,
        pool: ExpertPool,
        embedder: TextEmbedder,
        settings: IndexSettings | None = None,
        describer: QueryDescriber | None = None,
    ):
        self.descriptions = descriptions_of(pool)
        self.index = load_index(pool.router_dir / FILE, pool.names, self.descriptions)
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
        self.describer = describer
        self.seconds = {"description": 0.0, "embedding": 0.0, "scoring": 0.0}
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
        started = time.perf_counter()
        texts = list(queries) if self.describer is None else self.describer.describe(queries)
        described = time.perf_counter()
        vectors = self.embedder.embed([self.index.query_prefix + text for text in texts])
        embedded = time.perf_counter()
        scores = self.index.similarity(vectors)
        self.seconds["description"] += described - started
        self.seconds["embedding"] += embedded - described
        self.seconds["scoring"] += time.perf_counter() - embedded
        return scores

    def check_embedder(self) -> None:
        """Raises GliderError if the embedder is not the model that made the index; see ``check_model``."""
        texts = [text for texts in self.descriptions.values() for text in texts]
        prefixed = [self.index.description_prefix + text for text in texts]
        check_model(self.index, self.embedder, prefixed, self.index.embeddings)


def global_router(job: Job, pool: ExpertPool) -> GlobalRouter:
    """The global router of a pool as the job is configured; all ranks make it together."""
    describer = QueryDescriber(job.cfg.describe) if job.cfg.describe.queries == "llm" else None
    return GlobalRouter(pool, job.embedder, index_settings(job.cfg), describer)


def query_settings(job: Job) -> dict[str, Any]:
    """What of the configuration changes the similarities, apart from the index."""
    describe = job.cfg.describe
    if describe.queries != "llm":
        return {}
    names = ("queries", "max_tokens", "temperature")
    return {"model": model_of(describe), **{name: getattr(describe, name) for name in names}}


class Ahead:
    """Similarities that a thread asks for while the model runs: batch by batch, in the order of their use.

    What has not been asked for when its context ends, in whatever way, never is: the process would not end before.

    Args:
        batches: positions of the queries of each batch; every query belongs to one.

    Attributes:
        waited: seconds that the model had to wait for similarities.
    """

    def __init__(self, router: GlobalRouter, queries: Sequence[str], batches: Sequence[Sequence[int]]):
        self.waited = 0.0
        self._width = len(router.index.names)
        self._batches = [torch.tensor(list(batch)) for batch in batches]
        self._place = {query: (number, row) for number, b in enumerate(batches) for row, query in enumerate(b)}
        self._thread = ThreadPoolExecutor(1, "similarity")
        self._scores: list[Future[torch.Tensor]] = [
            self._thread.submit(router.similarity, [queries[i] for i in batch]) for batch in batches
        ]

    def __getitem__(self, chosen: list[int]) -> torch.Tensor:
        """Rows ``[len(chosen), E]``; waits for them if they are not there yet. Zeros if there is no query at all:
        a rank without queries keeps in step with the others by a dummy."""
        if not self._place:
            return torch.zeros(len(chosen), self._width)
        started = time.perf_counter()
        rows = [self._scores[number].result()[row] for number, row in (self._place[i] for i in chosen)]
        self.waited += time.perf_counter() - started
        return torch.stack(rows)

    def all(self) -> torch.Tensor:
        """``[queries, E]``."""
        result = torch.zeros(len(self._place), self._width)
        for batch, scores in zip(self._batches, self._scores, strict=True):
            result[batch] = scores.result()
        return result

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
