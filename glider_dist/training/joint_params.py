"""Which experts and gates train, and how their values reach the layers.

Legend: e experts of this rank, E experts of the pool, n of them trained, r rank, d and o widths of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from glider_dist.errors import GliderError
from glider_dist.model.context import RoutingContext


@dataclass(frozen=True)
class Rows:
    """Rows of a stack that train, ascending; the others stay as they are.

    DeepSpeed handles no empty parameter, so where no row trains (a rank that owns no trained expert) the parameter
    is one row of zeros that nothing reads.
    """

    trained: tuple[int, ...]
    total: int

    @property
    def all(self) -> bool:
        return len(self.trained) == self.total > 0

    def pick(self, stack: torch.Tensor) -> torch.Tensor:
        """The parameter ``[max(n, 1), ...]`` for a stack ``[total, ...]``."""
        if not self.trained:
            return stack.new_zeros(1, *stack.shape[1:])
        return stack[list(self.trained)].clone()

    def merge(self, value: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
        """The stack with the trained rows taken from ``value``, differentiable; always depends on it."""
        if self.all:
            return value
        rest = [row for row in range(self.total) if row not in self.trained]
        place = {row: index for index, row in enumerate([*self.trained, *rest])}
        order = torch.tensor([place[row] for row in range(self.total)], dtype=torch.int64, device=stack.device)
        return torch.cat([value[: len(self.trained)], stack[rest]]).index_select(0, order)


class Trained:
    """What trains of an attached pool.

    Args:
        context: of the model; its banks hold this rank's experts, its gates those of all.
        owned: ids of this rank's experts, in the order of the banks.
        chosen: names of the experts that train, with their gates; empty: all.
        experts, gates: whether these train at all.

    Attributes:
        experts: ``{"SITE.A": [n, r, d], "SITE.B": [n, r, o]}`` initial values, of this rank's trained experts.
        gates: ``{"SITE.gate": [n, d]}`` of all trained ones.

    Raises:
        GliderError: an expert is unknown, or gates shall train where there are none.
    """

    def __init__(
        self, context: RoutingContext, owned: Sequence[int], chosen: Sequence[str], experts: bool, gates: bool
    ):
        self.context = context
        self.names = context.names
        self.owned = tuple(owned)
        if unknown := [name for name in chosen if name not in context.names]:
            raise GliderError(f"joint.experts names {unknown[0]!r}, but the pool has no such expert")
        if gates and not context.gates:
            raise GliderError("the pool has no gates to train; run train-gates, or set joint.train=experts")
        self.chosen = tuple(i for i, name in enumerate(context.names) if not chosen or name in chosen)
        self._own = Rows(tuple(p for p, i in enumerate(self.owned) if i in self.chosen), len(self.owned))
        self._all = Rows(self.chosen, len(context.names))
        self._banks = {site: (bank.A, bank.B) for site, bank in context.banks.items()} if experts else {}
        self._gates = dict(context.gates) if gates else {}
        self.experts: dict[str, torch.Tensor] = {}
        for site, (a_erd, b_ero) in self._banks.items():
            self.experts |= {f"{site}.A": self._own.pick(a_erd), f"{site}.B": self._own.pick(b_ero)}
        self.gates = {f"{site}.gate": self._all.pick(gate) for site, gate in self._gates.items()}

    @property
    def elements(self) -> int:
        """Numbers that train on this rank."""
        return sum(tensor.numel() for tensor in (*self.experts.values(), *self.gates.values()))

    def bind(self, values: Mapping[str, torch.Tensor]) -> None:
        """Let the layers compute with these values until the next call."""
        context = self.context
        for site, (a_erd, b_ero) in self._banks.items():
            bank = context.banks[site]
            bank.A = self._own.merge(values[f"{site}.A"], a_erd)
            bank.B = self._own.merge(values[f"{site}.B"], b_ero)
        for site, gate_Ed in self._gates.items():
            context.gates[site] = self._all.merge(values[f"{site}.gate"], gate_Ed)
        if self._gates:
            context.prototypes.forget_gates()
        if self._banks and context.dispatch is not None:
            # A forward without gradients would keep what it fetched.
            context.dispatch.cache.clear()

    @property
    def own(self) -> tuple[int, ...]:
        """Ids of the trained experts that this rank owns, in the order of its parameters' rows."""
        return tuple(self.owned[position] for position in self._own.trained)

    def rank_of(self, expert: int, site: str) -> int:
        """LoRA rank of an expert that this rank owns; 0 where it does not adapt the site."""
        return self.context.banks[site].ranks[self.owned.index(expert)]
