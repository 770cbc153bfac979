"""Timing on a noisy machine: the variants take turns within each round, and ratios are those of the medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from glider_dist.pool.files import write_json
from glider_dist.tracking.versions import device_name


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round to warm up; a GPU has finished when they end.

    Every round has an order of its own (the same in every process), as what ran before leaves its mark in caches
    and allocator: with one order for all, that is part of a variant's median.

    Args:
        before: called before each measurement, untimed (such as a barrier).
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(rounds + 1):
        for name in random.Random(repeat).sample(list(variants), len(variants)):
            before()
            _finish()
            started = time.perf_counter()
            variants[name]()
            _finish()
            elapsed = time.perf_counter() - started
            if repeat:
                seconds[name].append(elapsed)
    return seconds


def _finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows with the same keys; floats to three digits, "-" for None."""
    if not rows:
        return ""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def save(folder: Path, name: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write rows, and what they were measured with and on, as ``bench_NAME.json``."""
    measured = {"bench": name, "torch": torch.__version__, "machine": device_name()}
    write_json(folder / f"bench_{name}.json", {**measured, **about, "rows": rows})
