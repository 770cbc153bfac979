"""Experts travel to the tokens: the strategy ``gather``.

Legend: E experts, S sites that read this input, F experts fetched for a site, r rank, d and o widths, P ranks.

Per exchange, besides the control numbers: one collective forward, and one backward if the experts train (their
gradients go back and are summed at the owner); none if no rank asks for anything; no host sync. Bytes that leave a
rank:

    forward    Σ over (site, expert) that another rank asked for      r (d + o) b
    backward   Σ over (site, expert) fetched from another rank        r (d + o) b

Frozen experts stay in a cache, bounded in bytes, and are not fetched again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from glider_dist.lora.bank import SiteBank
from glider_dist.parallel.exchange import all_to_all

Ids = np.ndarray[Any, np.dtype[np.int64]]
Pair = tuple[torch.Tensor, torch.Tensor]
"""A and B."""


@dataclass(frozen=True)
class Fetch:
    """Which experts go where.

    Attributes:
        asked: ``[P][S]`` for each rank and site, positions in this rank's bank that the rank asked for.
        wanted: ``[P][S]`` for each rank and site, ids of its experts that this rank asked for.
        shapes: for each site, padded LoRA rank, ``d_in`` and ``d_out``.
        dtype: in which they travel.
    """

    asked: list[list[Ids]]
    wanted: list[list[Ids]]
    shapes: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype
    group: dist.ProcessGroup

    @property
    def send(self) -> list[int]:
        return [self._elements(sites) for sites in self.asked]

    @property
    def receive(self) -> list[int]:
        return [self._elements(sites) for sites in self.wanted]

    def _elements(self, sites: list[Ids]) -> int:
        return sum(len(ids) * r * (d + o) for ids, (r, d, o) in zip(sites, self.shapes, strict=True))

    def ids(self, site: int) -> Ids:
        """Ids of the fetched experts of a site, in the order of the fetched bank."""
        return np.concatenate([sites[site] for sites in self.wanted])


def plan_fetch(
    mask_PSE: np.ndarray[Any, Any],
    me: int,
    owned: Sequence[Ids],
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    group: dist.ProcessGroup,
) -> Fetch:
    """From what every rank asks for (bool ``[P, S, E]``) to who sends what.

    Args:
        me: this rank's place in the group.
        owned: for each rank the ids of its experts, ascending.
    """
    sites = range(mask_PSE.shape[1])
    asked = [[np.flatnonzero(mask_PSE[rank, site, owned[me]]) for site in sites] for rank in range(len(owned))]
    wanted = [[ids[mask_PSE[me, site, ids] != 0] for site in sites] for ids in owned]
    return Fetch(asked, wanted, tuple(shapes), dtype, group)


class _Fetch(torch.autograd.Function):
    """A and B of every site's experts to the ranks that asked; backward sums the gradients at the owner."""

    @staticmethod
    def forward(ctx: Any, plan: Fetch, *stacked: torch.Tensor) -> tuple[torch.Tensor, ...]:
        device = stacked[0].device
        flat = np.concatenate([ids for sites in plan.asked for ids in sites])
        index = torch.from_numpy(flat).to(device, non_blocking=True)
        lengths = [len(ids) for sites in plan.asked for ids in sites]
        pieces = []
        for place, ids in enumerate(index.split(lengths)):
            site = place % len(plan.shapes)
            for tensor in stacked[2 * site : 2 * site + 2]:
                pieces.append(tensor.index_select(0, ids).to(plan.dtype).view(-1))
        received = all_to_all("experts", torch.cat(pieces), plan.send, plan.receive, plan.group)
        ctx.plan, ctx.index, ctx.lengths = plan, index, lengths
        ctx.shapes = [(tensor.shape, tensor.dtype) for tensor in stacked]
        return _unpack(received, plan.wanted, plan.shapes)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan = ctx.plan
        parts = [grad.split([len(sites[place // 2]) for sites in plan.wanted]) for place, grad in enumerate(grads)]
        flat = torch.cat([part[rank].reshape(-1) for rank in range(len(plan.wanted)) for part in parts])
        back = all_to_all("experts_grad", flat, plan.receive, plan.send, plan.group)
        sums = [torch.zeros(shape, dtype=dtype, device=back.device) for shape, dtype in ctx.shapes]
        offset = 0
        # Rank by rank, so that the order of the sum is always the same.
        for place, ids in enumerate(ctx.index.split(ctx.lengths)):
            site = place % len(plan.shapes)
            for total in sums[2 * site : 2 * site + 2]:
                size = len(ids) * total[0].numel() if len(ids) else 0
                if size:
                    piece = back[offset : offset + size].view(len(ids), *total.shape[1:])
                    total.index_add_(0, ids, piece.to(total.dtype))
                offset += size
        return None, *sums


def _unpack(
    flat: torch.Tensor, ids: list[list[Ids]], shapes: Sequence[tuple[int, int, int]]
) -> tuple[torch.Tensor, ...]:
    """``A [F, r, d]`` and ``B [F, r, o]`` of each site from what came from each rank."""
    found: list[list[torch.Tensor]] = [[] for _ in range(2 * len(shapes))]
    offset = 0
    for sites in ids:
        for site, (r, d, o) in enumerate(shapes):
            for place, width in ((2 * site, d), (2 * site + 1, o)):
                size = len(sites[site]) * r * width
                found[place].append(flat[offset : offset + size].view(-1, r, width))
                offset += size
    return tuple(torch.cat(pieces) for pieces in found)


def fetch_experts(banks: Sequence[SiteBank], plan: Fetch) -> list[Pair]:
    """For each site ``A [F, r, d]`` and ``B [F, r, o]`` of the wanted experts, in the order of ``plan.ids``."""
    stacked = [tensor for bank in banks for tensor in (bank.A, bank.B)]
    flat = _Fetch.apply(plan, *stacked)
    return [(flat[2 * site], flat[2 * site + 1]) for site in range(len(banks))]


class ExpertCache:
    """Frozen experts that were fetched, bounded in bytes; the least recently used go first.

    A rank's own experts count as held: they are taken from its bank. What an exchange was told is held stays so
    until :meth:`shrink`, which ends it: in between, the limit may be exceeded by what that exchange fetched.
    """

    def __init__(self, limit_bytes: int, owned: Ids, experts: int, device: torch.device):
        self.limit = limit_bytes
        self.nbytes = 0
        self._slot = {expert: slot for slot, expert in enumerate(owned.tolist())}
        self._own_E = torch.zeros(experts, dtype=torch.bool, device=device)
        self._own_E[torch.from_numpy(owned).to(device)] = True
        self._held: dict[str, torch.Tensor] = {}
        self._entries: OrderedDict[tuple[str, int], Pair] = OrderedDict()

    def held(self, site: str) -> torch.Tensor:
        """``[E]`` bool on the device: what need not be asked for."""
        return self._held.get(site, self._own_E)

    def stack(
        self,
        site: str,
        used: Ids,
        bank: SiteBank,
        fetched: Ids,
        fresh: Pair | None,
        dtype: torch.dtype,
        remember: bool = True,
    ) -> Pair:
        """A and B of the used experts, in that order.

        Args:
            bank: the rank's own experts.
            fetched: ids of the ``fresh`` ones.
            remember: keep copies of the fresh ones.
        """
        new = {} if remember else {expert: place for place, expert in enumerate(fetched.tolist())}
        # Kept for later forwards, which may need gradients even if this one does not.
        with torch.inference_mode(False), torch.no_grad():
            for place, expert in enumerate(fetched.tolist() if remember else ()):
                assert fresh is not None
                # Copies: a view would keep the whole message alive.
                self._entries[site, expert] = (fresh[0][place].clone(), fresh[1][place].clone())
                self.nbytes += sum(tensor.nbytes for tensor in self._entries[site, expert])
            if remember and len(fetched):
                # Not ``held[...] = True``: CUDA copies that number, and waits for it.
                index = torch.from_numpy(fetched).to(self._own_E.device, non_blocking=True)
                self._held[site] = self.held(site).index_fill(0, index, True)
        rows = []
        for expert in used.tolist():
            if expert in self._slot:
                slot = self._slot[expert]
                rows.append((bank.A[slot].to(dtype), bank.B[slot].to(dtype)))
            elif expert in new:
                assert fresh is not None
                rows.append((fresh[0][new[expert]], fresh[1][new[expert]]))
            else:
                rows.append(self._entries[site, expert])
                self._entries.move_to_end((site, expert))
        if not rows:
            return bank.A[:0].to(dtype), bank.B[:0].to(dtype)
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    def shrink(self) -> None:
        """Keep to the limit: an exchange has taken what it needs."""
        while self.nbytes > self.limit and self._entries:
            (site, expert), pair = self._entries.popitem(last=False)
            self.nbytes -= sum(tensor.nbytes for tensor in pair)
            with torch.inference_mode(False):
                self._held[site][expert] = False

    def clear(self) -> None:
        """Forget all: the experts have changed."""
        self._entries.clear()
        self._held.clear()
        self.nbytes = 0
