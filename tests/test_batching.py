"""The batcher of the embedding service, with a model that only notes what it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch

from glider_dist.semantics.service.batching import Batcher
from glider_dist.semantics.service.metrics import Metrics


class Noting:
    """A text of n characters has n tokens; its vector is its length."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def fingerprint(self) -> str:
        return "noting"

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        self.batches.append(list(texts))
        return torch.tensor([[float(len(text))] for text in texts])


def served(model: Noting, requests: Sequence[Sequence[str]], max_batch_tokens: int) -> None:
    async def ask() -> None:
        batcher = Batcher(model, Metrics(), max_batch_tokens, 0.0, 100_000, None)  # type: ignore[arg-type]
        batcher.start()
        await asyncio.gather(*(batcher.embed(texts) for texts in requests))
        await batcher.close()

    asyncio.run(ask())


def test_texts_of_several_requests_are_batched_by_length() -> None:
    model = Noting()
    served(model, [["a" * n for n in range(1, 20, 2)], ["a" * n for n in range(2, 21, 2)]], 40)
    lengths = [[len(text) for text in batch] for batch in model.batches]
    assert sorted(length for batch in lengths for length in batch) == list(range(1, 21))
    assert all(len(batch) * max(batch) <= 40 for batch in lengths)
    # As few as if all had come in one request: 1-6, 7-10, 11-13, then two at a time and the last alone.
    assert len(lengths) <= 8


def test_a_long_text_waits_for_no_more_than_a_window_of_shorter_ones() -> None:
    model = Noting()
    shorter = [f"{i:05}" for i in range(2000)]
    served(model, [["long" * 10], *([text] for text in shorter)], 40)
    before = next(i for i, batch in enumerate(model.batches) if "long" * 10 in batch)
    assert sum(len(batch) for batch in model.batches[:before]) <= 511
    assert sum(len(batch) for batch in model.batches) == 2001
