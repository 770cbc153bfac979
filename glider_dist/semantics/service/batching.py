"""From texts of many requests to batches of one model.

Texts wait in one queue. While a batch is computed others arrive, so that under load batches fill by themselves;
an idle model waits ``max_wait`` for more. Texts join a window until it has had so many; batches of
``max_batch_tokens`` are taken from it by length, the shortest first, until it is empty. A text that is being
computed for one request is not computed again for another.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from glider_dist.semantics.cache_file import CacheFile
from glider_dist.semantics.embedder import Embedder, batches
from glider_dist.semantics.service.metrics import Metrics
from glider_dist.semantics.vectors import Recent, pack, text_key

log = logging.getLogger(__name__)

_WINDOW = 512  # texts of a window; none waits for more than one window of others
_IN_MEMORY = 16_384


class QueueFull(Exception):
    """Too many texts wait; ``retry_after`` seconds are likely to be enough."""

    def __init__(self, retry_after: float):
        super().__init__("the queue is full")
        self.retry_after = retry_after


@dataclass(frozen=True)
class _Waiting:
    key: bytes
    text: str
    result: asyncio.Future[bytes]


class Batcher:
    """Answers :meth:`embed` for many tasks of one event loop. Call :meth:`start` in the loop first.

    Args:
        max_batch_tokens: tokens of a batch at most, padding counted.
        max_wait: seconds that an idle model waits for more texts.
        max_queue: texts that may wait; more are refused with :class:`QueueFull`.
        file: the cache on disk, or None.
    """

    def __init__(
        self,
        model: Embedder,
        metrics: Metrics,
        max_batch_tokens: int,
        max_wait: float,
        max_queue: int,
        file: CacheFile | None,
    ):
        self.model = model
        self.metrics = metrics
        self.max_batch_tokens = max_batch_tokens
        self.max_wait = max_wait
        self.max_queue = max_queue
        self._file = file
        self._recent = Recent(_IN_MEMORY)
        self._pending: deque[_Waiting] = deque()
        self._asked: dict[bytes, asyncio.Future[bytes]] = {}
        self._computing = ThreadPoolExecutor(1, "model")
        self._disk = ThreadPoolExecutor(1, "cache")
        self._texts_per_second = 100.0
        self._work = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._keep(self._run())

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def embed(self, texts: Sequence[str]) -> list[bytes]:
        """The entry (see :mod:`glider_dist.semantics.vectors`) of each text.

        Raises:
            QueueFull: nothing of the request was queued.
        """
        keys = [text_key(text, self.model.fingerprint()) for text in texts]
        wanted = dict(zip(keys, texts, strict=True))
        known = {key: entry for key in wanted if (entry := self._recent.get(key)) is not None}
        self.metrics.texts.labels("memory").inc(len(keys) - sum(key not in known for key in keys))
        new = [key for key in wanted if key not in known and key not in self._asked]
        if len(self._asked) + len(new) > self.max_queue:
            raise QueueFull(max(1.0, len(self._asked) / self._texts_per_second))
        shared = [key for key in wanted if key not in known and key in self._asked]
        self.metrics.texts.labels("shared").inc(len(shared))
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(key, wanted[key], loop.create_future()) for key in new]
        self._asked.update((item.key, item.result) for item in waiting)
        self.metrics.queue.set(len(self._asked))
        results = {key: self._asked[key] for key in (*shared, *new)}
        if waiting:
            self._keep(self._look_up(waiting))
        if results:
            # Unlike gather, wait leaves the results alone if this request is cancelled: others may share them.
            await asyncio.wait(results.values())
        return [known[key] if key in known else results[key].result() for key in keys]

    async def _look_up(self, waiting: list[_Waiting]) -> None:
        found: dict[bytes, bytes] = {}
        if self._file is not None:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._disk, self._file.get, [item.key for item in waiting])
        self.metrics.texts.labels("disk").inc(len(found))
        for item in waiting:
            if item.key in found:
                self._answer(item, found[item.key])
            else:
                self._pending.append(item)
        self._work.set()

    def _answer(self, item: _Waiting, entry: bytes) -> None:
        self._recent.put(item.key, entry)
        self._asked.pop(item.key, None)
        self.metrics.queue.set(len(self._asked))
        if not item.result.done():
            item.result.set_result(entry)

    def _fail(self, items: Sequence[_Waiting], error: Exception) -> None:
        for item in items:
            self._asked.pop(item.key, None)
            if not item.result.done():
                item.result.set_exception(error)
                item.result.exception()  # whoever asked may have gone; that is no error of its own
        self.metrics.queue.set(len(self._asked))

    async def _run(self) -> None:
        window: list[tuple[int, _Waiting]] = []
        taken = 0
        while True:
            if not window:
                taken = 0
                if not self._pending:
                    self._work.clear()
                    await self._work.wait()
                    if self.max_wait > 0:
                        await asyncio.sleep(self.max_wait)
            # What has come since the last batch finds its place by length.
            new = [self._pending.popleft() for _ in range(min(len(self._pending), _WINDOW - taken))]
            taken += len(new)
            window += await self._measured(new)
            if window:
                chosen = batches([tokens for tokens, _ in window], self.max_batch_tokens)[0]
                batch = [window[i] for i in chosen]
                window = [window[i] for i in sorted(set(range(len(window))) - set(chosen))]
                await self._batch([item for _, item in batch], [tokens for tokens, _ in batch])

    async def _measured(self, items: list[_Waiting]) -> list[tuple[int, _Waiting]]:
        """Each with its number of tokens; none if they cannot be tokenized, which is then their answer."""
        if not items:
            return []
        loop = asyncio.get_running_loop()
        try:
            lengths = await loop.run_in_executor(self._computing, self.model.lengths, [i.text for i in items])
        except Exception as error:
            log.exception("texts cannot be tokenized")
            self._fail(items, error)
            return []
        return list(zip(lengths, items, strict=True))

    async def _batch(self, items: list[_Waiting], lengths: list[int]) -> None:
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        try:
            vectors = await loop.run_in_executor(self._computing, self.model.encode, [item.text for item in items])
        except Exception as error:
            log.exception("a batch of %d texts failed", len(items))
            self._fail(items, error)
            return
        rate = len(items) / max(time.perf_counter() - started, 1e-6)
        self._texts_per_second += 0.2 * (rate - self._texts_per_second)
        self.metrics.batch.observe(len(items))
        self.metrics.tokens.inc(sum(lengths))
        self.metrics.texts.labels("computed").inc(len(items))
        rows = vectors.numpy()
        entries = {item.key: pack(n, row) for item, n, row in zip(items, lengths, rows, strict=True)}
        for item in items:
            self._answer(item, entries[item.key])
        if self._file is not None:
            self._disk.submit(self._file.put, entries)

    async def close(self) -> None:
        """Write what is computed to disk and end the threads; texts that still wait fail."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for result in list(self._asked.values()):
            result.cancel()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._disk.shutdown)
        await loop.run_in_executor(None, self._computing.shutdown)
        if self._file is not None:
            self._file.close()
