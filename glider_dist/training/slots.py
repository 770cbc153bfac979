"""The experts (or gates) that a rank trains at a time: rows of one matrix, seen by the layers as stacked banks.

A slot is one expert's row ``[n]`` of weights and of gradients. The layers get leaves that are views of both, so a
backward adds to the rows in place, and any run of neighbouring slots can be served without a copy.

Legend: e slots, n parameters of one expert, k slots being served, r rank, d and o widths of a site.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

from glider_dist.lora.bank import SiteBank, initial_site, padded_rank
from glider_dist.model.context import RoutingContext
from glider_dist.pool.adapter import SiteLora

# Rows of the products must start at multiples of 16 bytes.
_ALIGN = 8


class Slots(ABC):
    """Weights and gradients ``[e, n]`` of ``count`` experts. Subclasses say what the layers see.

    Attributes:
        names: of the expert in each slot; "" before the first.
        weights, grads: ``[e, n]``.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], count: int, dtype: torch.dtype, device: torch.device
    ):
        self.names = [""] * count
        self._spans: dict[str, tuple[int, tuple[int, ...]]] = {}
        width = 0
        for key, shape in shapes.items():
            self._spans[key] = (width, shape)
            width += -(-math.prod(shape) // _ALIGN) * _ALIGN
        self.weights = torch.zeros(count, width, dtype=dtype, device=device)
        self.grads = torch.zeros_like(self.weights)
        self._served: dict[tuple[int, int], tuple[dict[str, SiteBank], dict[str, torch.Tensor]]] = {}

    def tensors(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views ``[k, *shape]`` of rows ``[k, n]``, by key."""
        return {
            key: rows[:, start : start + math.prod(shape)].unflatten(1, shape)
            for key, (start, shape) in self._spans.items()
        }

    @property
    def bytes_per_expert(self) -> int:
        """Bytes of the weights and gradients of one expert."""
        return 2 * self.weights.shape[1] * self.weights.element_size()

    def frozen(self) -> list[torch.Tensor]:
        """What the slots hold besides their rows."""
        return []

    def seen(self) -> tuple[dict[str, SiteBank], dict[str, torch.Tensor]]:
        """Banks and gates over all slots, to put into a model; :meth:`serve` chooses what it computes with."""
        return self.banks(self.tensors(self.weights), 0, len(self.names))

    def enter(self, slot: int, name: str) -> None:
        """Give a slot to an expert, with its initial weights."""
        self.weights[slot].zero_()
        self.grads[slot].zero_()
        self.names[slot] = name
        self._served.clear()
        self.initialise(slot, name)

    @abstractmethod
    def initialise(self, slot: int, name: str) -> None:
        """Put an expert's initial weights into a slot that is all zeros."""

    @abstractmethod
    def banks(
        self, leaves: dict[str, torch.Tensor], lo: int, hi: int
    ) -> tuple[dict[str, SiteBank], dict[str, torch.Tensor]]:
        """What the layers see of slots ``lo`` to ``hi``: banks and gates."""

    def serve(self, context: RoutingContext, lo: int, hi: int, collect: bool) -> None:
        """Make the layers see slots ``lo`` to ``hi`` alone, as experts 0 to ``hi - lo - 1``.

        Args:
            collect: whether a backward adds to :attr:`grads`; otherwise its gradients are lost.
        """
        served = self._served.get((lo, hi)) if collect else None
        if served is None:
            leaves = {
                key: view.detach().requires_grad_() for key, view in self.tensors(self.weights[lo:hi]).items()
            }
            if collect:
                for leaf, grad in zip(leaves.values(), self.tensors(self.grads[lo:hi]).values(), strict=True):
                    leaf.grad = grad
            served = self.banks(leaves, lo, hi)
            if collect:
                self._served[lo, hi] = served
        context.names = tuple(self.names[lo:hi])
        context.banks, context.gates = served
        # Counts are per bank, and this one may have another number of experts than the last.
        context.counts.clear()


class ExpertSlots(Slots):
    """Experts in training: A and B of every site are parameters, fresh ones follow from seed and name alone."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        count: int,
        rank: int,
        alpha: float,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """``shapes``: ``{site: (d_out, d_in)}``."""
        keys: dict[str, tuple[int, ...]] = {}
        padded = padded_rank(rank)
        for site, (d_out, d_in) in shapes.items():
            keys |= {f"{site}.A": (padded, d_in), f"{site}.B": (padded, d_out)}
        super().__init__(keys, count, dtype, device)
        self.shapes, self.rank, self.alpha, self.seed = shapes, rank, alpha, seed
        self._scale = torch.full((count,), alpha / rank, device=device)
        self._eligible = torch.ones(count, dtype=torch.bool, device=device)

    def initialise(self, slot: int, name: str) -> None:
        target = self.tensors(self.weights[slot : slot + 1])
        for site, shape in self.shapes.items():
            fresh = initial_site([name], site, shape, self.rank, self.alpha, self.seed)
            # Rows that pad the rank stay zero: neither they nor their B ever get a gradient.
            target[f"{site}.A"][:, : self.rank] = fresh.A

    def banks(
        self, leaves: dict[str, torch.Tensor], lo: int, hi: int
    ) -> tuple[dict[str, SiteBank], dict[str, torch.Tensor]]:
        scale, eligible = self._scale[lo:hi], self._eligible[lo:hi]
        ranks = (self.rank,) * (hi - lo)
        return {
            site: SiteBank(leaves[f"{site}.A"], leaves[f"{site}.B"], scale, eligible, ranks)
            for site in self.shapes
        }, {}

    def weights_of(self, row: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """``{site: (A [r, d], B [o, r])}`` of one expert's row ``[n]``."""
        views = self.tensors(row[None])
        return {
            site: (views[f"{site}.A"][0, : self.rank], views[f"{site}.B"][0, : self.rank].t())
            for site in self.shapes
        }


class GateSlots(Slots):
    """Gates in training, one vector per site, over experts that stay as they are."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        ranks: Mapping[str, int],
        read: Callable[[str], dict[str, SiteLora]],
        count: int,
        dtype: torch.dtype,
        base_dtype: torch.dtype,
        device: torch.device,
    ):
        """
        Args:
            shapes: ``{site: (d_out, d_in)}`` of every site that any expert adapts.
            ranks: the largest rank of any expert at each of them.
            read: an expert's weights, by name.
            base_dtype: dtype of the experts.
        """
        super().__init__({site: (d_in,) for site, (_, d_in) in shapes.items()}, count, dtype, device)
        self._read = read
        self._frozen = {
            site: SiteBank(
                torch.zeros(count, padded_rank(ranks[site]), d_in, dtype=base_dtype, device=device),
                torch.zeros(count, padded_rank(ranks[site]), d_out, dtype=base_dtype, device=device),
                torch.zeros(count, device=device),
                torch.ones(count, dtype=torch.bool, device=device),
                (padded_rank(ranks[site]),) * count,
            )
            for site, (d_out, d_in) in shapes.items()
        }

    @property
    def bytes_per_expert(self) -> int:
        """Bytes of a gate, its gradient, and the expert that it weights."""
        return super().bytes_per_expert + sum(tensor.nbytes for tensor in self.frozen()) // len(self.names)

    def frozen(self) -> list[torch.Tensor]:
        return [tensor for bank in self._frozen.values() for tensor in (bank.A, bank.B)]

    def initialise(self, slot: int, name: str) -> None:
        loras = self._read(name)
        for site, bank in self._frozen.items():
            for tensor in (bank.A, bank.B, bank.scale):
                tensor[slot].zero_()
            # Where an expert does not adapt a site its factor is 0, so that its gate there stays 0, too.
            if lora := loras.get(site):
                bank.A[slot, : lora.A.shape[0]] = lora.A
                bank.B[slot, : lora.B.shape[1]] = lora.B.t()
                bank.scale[slot] = lora.scale

    def banks(
        self, leaves: dict[str, torch.Tensor], lo: int, hi: int
    ) -> tuple[dict[str, SiteBank], dict[str, torch.Tensor]]:
        return {
            site: SiteBank(
                bank.A[lo:hi], bank.B[lo:hi], bank.scale[lo:hi], bank.eligible[lo:hi], bank.ranks[lo:hi]
            )
            for site, bank in self._frozen.items()
        }, leaves

    def gate_of(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """``{site: v [d]}`` of one gate's row ``[n]``."""
        return {site: view[0] for site, view in self.tensors(row[None]).items()}
