"""The collectives of the dispatch, each counted, and each failing with a sentence that names it.

Every strategy is built from two: one even all-gather of control numbers, whose result every rank copies to the
host once, and uneven all-to-alls whose sizes both sides then know.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from glider_dist.errors import GliderError

log = logging.getLogger(__name__)


@dataclass
class Traffic:
    """What one rank sent and waited for while being counted.

    Attributes:
        collectives: calls by name (``counts``, ``tokens``, ``outputs``, ``experts``, ... and their ``_grad``).
        sent: bytes by name that left this rank for another.
        host_syncs: copies from the device that the host waited for.
    """

    collectives: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    host_syncs: int = 0

    def add(self, name: str, nbytes: int) -> None:
        self.collectives[name] = self.collectives.get(name, 0) + 1
        self.sent[name] = self.sent.get(name, 0) + nbytes


_counting: list[Traffic] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count this rank's exchanges, forward and backward, until the context ends."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to the CPU; the one place where an exchange waits for its device."""
    for traffic in _counting:
        traffic.host_syncs += 1
    return tensor.cpu()


def all_gather_rows(name: str, row: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``row`` ``[n]`` of every rank of the group: ``[P, n]``."""
    ranks = dist.get_world_size(group)
    for traffic in _counting:
        traffic.add(name, row.nbytes * (ranks - 1))
    rows = row.new_empty(ranks, row.numel())
    _guarded(name, group, lambda: dist.all_gather(list(rows.unbind()), row.contiguous(), group=group))
    return rows


def gather_objects(name: str, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """``value`` of every rank of the group (None: of the job), in order of rank; for start-up, not counted."""
    group = group or dist.group.WORLD
    assert group is not None
    values: list[Any] = [None] * dist.get_world_size(group)
    _guarded(name, group, lambda: dist.all_gather_object(values, value, group=group))
    return values


def all_to_all(
    name: str, data: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Uneven all-to-all along dim 0: ``send[p]`` entries go to rank p, ``receive[p]`` come from it."""
    if data.shape[0] != sum(send):
        # PyTorch does not compare the sizes; the ranks would hang or read garbage.
        raise GliderError(f"exchange {name!r}: {data.shape[0]} rows to send, but the plan says {sum(send)}")
    own = dist.get_rank(group)
    for traffic in _counting:
        traffic.add(name, (sum(send) - send[own]) * (data[0].numel() * data.element_size() if len(data) else 0))
    received = data.new_empty((sum(receive), *data.shape[1:]))
    send, receive = list(send), list(receive)
    _guarded(name, group, lambda: dist.all_to_all_single(received, data.contiguous(), receive, send, group=group))
    return received


def in_backward() -> bool:
    """Whether a backward pass runs: a forward inside it repeats an earlier one (activation checkpointing)."""
    return bool(torch._C._current_graph_task_id() != -1)


def _guarded(name: str, group: dist.ProcessGroup, collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        silent = _silent_ranks(ranks)
        who = f"no word from rank {', '.join(map(str, silent))}" if silent else "all ranks still answer"
        raise GliderError(
            f"rank {dist.get_rank()}: the exchange {name!r} among ranks {ranks} broke off ({who}); the first rank "
            "that ended says why in its own output; start the job again, it goes on from its last checkpoint"
        ) from error


def _silent_ranks(ranks: list[int], patience_s: float = 5.0) -> list[int]:
    """The ranks that do not report the broken exchange as well, within a few seconds: dead or stuck ones.

    The rank that hosts the store takes it along when it dies; then the store itself cannot be reached.
    """
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"glider_dist/broken/{dist.get_rank()}", "1")
        end = time.monotonic() + patience_s
        silent = list(ranks)
        while silent and time.monotonic() < end:
            silent = [rank for rank in silent if not store.check([f"glider_dist/broken/{rank}"])]
            time.sleep(0.05)
        return silent
    except RuntimeError as error:
        log.debug("the store cannot be reached: %s", error)
        return [0] if dist.get_rank() != 0 else []
