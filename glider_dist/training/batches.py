"""Which rows of a step share a forward: little padding, few forwards, and large experts by themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from glider_dist.model.batch import Encoded
from glider_dist.model.quantised import weight_count


@dataclass(frozen=True)
class Packing:
    """What a forward may hold and what it costs.

    Attributes:
        tokens: padded tokens of a forward at most (a longer row goes by itself).
        enough: tokens from which an expert's own rows fill a forward, so that it is not mixed with others.
        mixed: tokens, padding excluded, of experts that share forwards, at most.
        overhead: what a forward costs over its tokens, in tokens.
        per_expert: what each expert adds to that in a mixed forward.
        rows: rows of a forward at most, or None.
    """

    tokens: int
    enough: int
    mixed: int
    overhead: int
    per_expert: int = 0
    rows: int | None = None


def packing_for(device: torch.device, model: nn.Module, tokens: int | None, rows: int | None) -> Packing:
    """The sizes for a device and a base; ``tokens`` and ``rows`` are ``train.micro_batch_tokens`` and ``_size``.

    Measured for SmolLM2-135M in bf16 on one core: a forward and backward costs as much as 96 tokens besides its
    own (0.3 s and 3.2 ms a token), and a few ms for each expert in it, so that small experts are mixed up to the
    largest forward. Mixing larger ones, too, would save up to 14 % (8 experts of 8 rows), but an expert with rows
    enough for forwards of its own ends with the same bits whomever it is trained with.

    On an H100 the same base takes 0.14 s to launch its kernels, whether they compute 1,024 tokens or 16,384, and
    about 4 µs for each token beyond; so bases of less than a billion weights fill forwards of 16,384 tokens. A
    larger base takes as long to launch and longer to compute; its sizes are estimates.
    """
    if device.type == "cpu":
        found = Packing(2048, 192, 2048, 96, 4)
    elif weight_count(model) < 1e9:
        found = Packing(16384, 8192, 16384, 16384, 16)
    else:
        found = Packing(8192, 4096, 8192, 2048, 16)
    tokens = tokens or found.tokens
    return replace(
        found, tokens=tokens, enough=min(found.enough, tokens), mixed=min(found.mixed, tokens), rows=rows
    )


def slots_for(device: torch.device, asked: int | None, experts: int) -> int:
    """How many of a rank's experts train at a time; ``asked`` is ``train.experts_in_flight``."""
    return max(1, min(asked or (8 if device.type == "cpu" else 32), experts))


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward: the slots ``lo`` to ``hi`` that they need, and each row's slot."""

    lo: int
    hi: int
    slots: list[int]
    items: list[Encoded]


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
        overhead = packing.overhead + (packing.per_expert * len(group) if len(group) > 1 else 0)
        for start, end in cuts([len(item) for _, item in rows], packing, overhead):
            # By slot again: rows of one expert side by side need no copy (``glider_dist.lora.blocks``).
            part = sorted(rows[start:end], key=lambda row: row[0])
            slots = [slot for slot, _ in part]
            found.append(MicroBatch(min(slots), max(slots) + 1, slots, [item for _, item in part]))
    return found


def _groups(chosen: Mapping[int, Sequence[Encoded]], packing: Packing, apart: Collection[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    room = 0
    for slot in sorted(chosen):
        tokens = sum(map(len, chosen[slot]))
        if slot in apart or tokens >= packing.enough:
            groups.append([slot])
            room = 0
        elif tokens <= room:
            groups[-1].append(slot)
            room -= tokens
        else:
            groups.append([slot])
            room = packing.mixed - tokens
    return groups


def cuts(lengths: Sequence[int], packing: Packing, overhead: int) -> list[tuple[int, int]]:
    """Cut ascending lengths into runs with the least total cost of ``overhead + rows * longest``."""
    sizes = np.asarray(lengths, dtype=np.int64)
    cost = np.zeros(len(sizes) + 1, dtype=np.int64)
    start_of = [0] * (len(sizes) + 1)
    for end in range(1, len(sizes) + 1):
        longest = sizes[end - 1]
        most = max(1, packing.tokens // longest)
        most = min(most, packing.rows) if packing.rows else most
        starts = np.arange(max(0, end - most), end)
        totals = cost[starts] + overhead + (end - starts) * longest
        best = int(totals.argmin())
        cost[end], start_of[end] = totals[best], int(starts[best])
    found = []
    end = len(sizes)
    while end:
        found.append((start_of[end], end))
        end = start_of[end]
    return found[::-1]
