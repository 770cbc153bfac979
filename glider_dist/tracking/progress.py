"""A progress bar on a terminal, a line now and then in a batch job's log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_LOG_SECONDS = 10.0


class _Lines:
    """stderr for tqdm where no carriage return can redraw a bar: each state becomes a line of its own."""

    encoding = "ascii"

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(
    iterable: Iterable[Any] | None = None,
    total: int | None = None,
    desc: str = "",
    enabled: bool = True,
    initial: int = 0,
) -> tqdm:
    """A tqdm bar on stderr; iterate over it, or call ``update(n)`` and ``close()``.

    Without a terminal it prints at most about one line every 10 s, and the last state at the end. Ranks
    other than the main one pass ``enabled=False`` and print nothing.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=desc or None,
        disable=not enabled,
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.2 if terminal else _LOG_SECONDS,
        dynamic_ncols=terminal,
    )


def begin_at(bar: tqdm, done: int) -> None:
    """Let a bar that nothing has moved yet go on from ``done``, which counts in no speed: it was done before."""
    bar.initial = bar.n = bar.last_print_n = done
