"""Which rows of a step share a forward: little padding, few forwards, and large experts by themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from glider_dist.model.batch import Encoded


@dataclass(frozen=True)
class Packing:
    """What a forward may hold and what it costs.

    Attributes:
        tokens: padded tokens of a forward at most (a longer row goes by itself).
        enough: tokens from which a forward runs at full speed; an expert that has so many is not mixed.
        overhead: what a forward costs over its tokens, in tokens.
        rows: rows of a forward at most, or None.
    """

    tokens: int
    enough: int
    overhead: int
    rows: int | None = None


def packing_for(device: torch.device, tokens: int | None, rows: int | None) -> Packing:
    """The sizes for a device; ``tokens`` and ``rows`` are ``train.micro_batch_tokens`` and ``_size``."""
    default, enough, overhead = (2048, 256, 24) if device.type == "cpu" else (8192, 4096, 2048)
    tokens = tokens or default
    return Packing(tokens, min(enough, tokens), overhead, rows)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward: the slots ``lo`` to ``hi`` that they need, and each row's slot."""

    lo: int
    hi: int
    slots: list[int]
    items: list[Encoded]

    @property
    def mixed(self) -> bool:
        return self.hi - self.lo > 1


def micro_batches(
    chosen: Mapping[int, Sequence[Encoded]], packing: Packing, apart: Collection[int] = ()
) -> list[MicroBatch]:
    """Cut a step's rows into forwards.

    An expert with enough rows is cut by itself, so that its forwards are those of training it alone; smaller ones
    share forwards with their neighbours. Each expert's weights are then needed by few forwards.

    Args:
        chosen: the rows of each slot that takes a step.
        apart: slots that share no forward whatever their size.
    """
    found = []
    for group in _groups(chosen, packing, apart):
        rows = sorted(((slot, item) for slot in group for item in chosen[slot]), key=lambda row: len(row[1]))
        for start, end in cuts([len(item) for _, item in rows], packing):
            part = rows[start:end]
            slots = [slot for slot, _ in part]
            found.append(MicroBatch(min(slots), max(slots) + 1, slots, [item for _, item in part]))
    return found


def _groups(chosen: Mapping[int, Sequence[Encoded]], packing: Packing, apart: Collection[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    room = 0
    for slot in sorted(chosen):
        tokens = sum(map(len, chosen[slot]))
        alone = slot in apart or tokens >= packing.enough
        if alone or room <= 0:
            groups.append([slot])
            room = 0 if alone else packing.enough - tokens
        else:
            groups[-1].append(slot)
            room -= tokens
    return groups


def cuts(lengths: Sequence[int], packing: Packing) -> list[tuple[int, int]]:
    """Cut ascending lengths into runs with the least total cost of ``overhead + rows * longest``."""
    sizes = np.asarray(lengths, dtype=np.int64)
    cost = np.zeros(len(sizes) + 1, dtype=np.int64)
    start_of = [0] * (len(sizes) + 1)
    for end in range(1, len(sizes) + 1):
        longest = sizes[end - 1]
        most = max(1, packing.tokens // longest)
        most = min(most, packing.rows) if packing.rows else most
        starts = np.arange(max(0, end - most), end)
        totals = cost[starts] + packing.overhead + (end - starts) * longest
        best = int(totals.argmin())
        cost[end], start_of[end] = totals[best], int(starts[best])
    found = []
    end = len(sizes)
    while end:
        found.append((start_of[end], end))
        end = start_of[end]
    return found[::-1]
