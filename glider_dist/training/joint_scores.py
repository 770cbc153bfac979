"""Query scores for training: as in inference, one per query and expert, asked for one step ahead."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from glider_dist.semantics.global_router import GlobalRouter
from glider_dist.training.joint_batches import Row


class ScoresAhead:
    """Cosines of queries, each text asked for once.

    Args:
        router: None if the job's router has no use for scores; then all are 0.
        experts: E.
    """

    def __init__(self, router: GlobalRouter | None, experts: int):
        self.router = router
        self.experts = experts
        self._known: dict[str, torch.Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "similarity")
        self._asked: Future[None] | None = None

    def ask(self, rows: Sequence[Row]) -> None:
        """Begin to look up what these rows need; a thread does it while the model runs."""
        texts = [row.query for row in rows]
        self._wait()
        self._asked = self._thread.submit(self._learn, texts)

    def of(self, rows: Sequence[Row]) -> torch.Tensor:
        """``[len(rows), E]`` fp32 on the CPU; one row of zeros where there are no rows."""
        if self.router is None or not rows:
            return torch.zeros(max(1, len(rows)), self.experts)
        self._wait()
        self._learn([row.query for row in rows])
        return torch.stack([self._known[row.query] for row in rows])

    def _learn(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if self.router is not None and new:
            self._known.update(zip(new, self.router.similarity(new), strict=True))

    def _wait(self) -> None:
        if self._asked is not None:
            self._asked.result()
            self._asked = None

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
