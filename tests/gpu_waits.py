"""Where the host waits for a GPU, as CUDA itself tells it."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from host_waits import who


class Seen:
    """
    Attributes:
        waits: how often the host waited, by the function of a library that made it. Unlike on the stand-in, a copy
            from pageable memory to the device is one, too.
        kernels: not counted here.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def clear(self) -> None:
        self.waits.clear()
        self.kernels.clear()


@contextlib.contextmanager
def on_a_gpu() -> Iterator[Seen]:
    """Counts every operation of which PyTorch says that it synchronises."""
    seen = Seen()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            seen.waits[who()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
