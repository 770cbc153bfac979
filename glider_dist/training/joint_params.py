"""Which experts and gates train, and how their values reach the layers.

Legend: e experts of this rank, E experts of the pool, n of them trained, r rank, d and o widths of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from glider_dist.errors import GliderError
from glider_dist.model.context import RoutingContext

Tensors = dict[str, torch.Tensor]


class Rows:
    """Rows of a stack that train, ascending; the others stay as they are.

    DeepSpeed handles no empty parameter, so where no row trains (a rank that owns no trained expert) the parameter
    is one row of zeros that nothing reads.

    Args:
        device: of the stacks.
    """

    def __init__(self, trained: Sequence[int], total: int, device: torch.device | str = "cpu"):
        self.trained = list(trained)
        others = set(range(total)).difference(trained)
        self._others = sorted(others)
        self.all = not others and total > 0
        place = {row: index for index, row in enumerate([*self.trained, *self._others])}
        self._order = torch.tensor([place[row] for row in range(total)], dtype=torch.int64, device=device)

    def like(self, stack: torch.Tensor) -> torch.Tensor:
        """The parameter's shape and dtype, on the meta device, for a stack ``[total, ...]``."""
        return stack.new_empty(max(len(self.trained), 1), *stack.shape[1:], device="meta")

    def pick(self, stack: torch.Tensor) -> torch.Tensor:
        """The parameter ``[max(n, 1), ...]``; the stack itself where all rows train."""
        if not self.trained:
            return stack.new_zeros(1, *stack.shape[1:])
        return stack if self.all else stack[self.trained]

    def rest(self, stack: torch.Tensor) -> torch.Tensor:
        """A copy of the rows that do not train."""
        return stack[self._others]

    def merge(self, value: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """The stack with the trained rows from ``value``, differentiable; always depends on it."""
        if self.all:
            return value
        return torch.cat([value[: len(self.trained)], rest]).index_select(0, self._order)


class Trained:
    """What trains of an attached pool.

    Args:
        context: of the model; its banks hold this rank's experts, its gates those of all.
        owned: ids of this rank's experts, in the order of the banks.
        chosen: names of the experts that train, with their gates; empty: all.
        experts, gates: whether these train at all.

    Attributes:
        experts: ``{"SITE.A": [n, r, d], "SITE.B": [n, r, o]}`` of this rank's trained experts, shapes and dtypes
            alone (on the meta device).
        gates: ``{"SITE.gate": [n, d]}`` of all trained ones, likewise.
        chosen: ids of all trained experts, in the order of the gates' rows.
        own: ids of those that this rank owns, in the order of its experts' rows.

    Raises:
        GliderError: an expert is unknown, or gates shall train where there are none.
    """

    def __init__(
        self, context: RoutingContext, owned: Sequence[int], chosen: Sequence[str], experts: bool, gates: bool
    ):
        self.context = context
        self.names = context.names
        known, wanted = set(context.names), set(chosen or context.names)
        if unknown := [name for name in chosen if name not in known]:
            raise GliderError(f"joint.experts names {unknown[0]!r}, but the pool has no such expert")
        if gates and not context.gates:
            raise GliderError("the pool has no gates to train; run train-gates, or set joint.train=experts")
        self.chosen = tuple(i for i, name in enumerate(context.names) if name in wanted)
        self.own = tuple(expert for expert in owned if context.names[expert] in wanted)
        self._position = {expert: position for position, expert in enumerate(owned)}
        self._row_of_own = {expert: row for row, expert in enumerate(self.own)}
        self._row_of_chosen = {expert: row for row, expert in enumerate(self.chosen)}
        self._trains = experts, gates
        own, every = self._stacks()
        self._own = Rows([self._position[expert] for expert in self.own], len(owned), _device(own))
        self._all = Rows(self.chosen, len(context.names), _device(every))
        self.experts = {key: self._own.like(stack) for key, stack in own.items()}
        self.gates = {key: self._all.like(stack) for key, stack in every.items()}
        # Whole stacks are not kept, as most of each, if not all, is what the first call of bind replaces.
        self._rest = {key: self._own.rest(stack) for key, stack in own.items()}
        self._rest |= {key: self._all.rest(stack) for key, stack in every.items()}

    def _stacks(self) -> tuple[Tensors, Tensors]:
        """What the layers compute with now: experts, and gates, of the kinds that train."""
        experts, gates = self._trains
        own: Tensors = {}
        for site, bank in self.context.banks.items() if experts else ():
            own |= {f"{site}.A": bank.A, f"{site}.B": bank.B}
        every = {f"{site}.gate": gate for site, gate in self.context.gates.items()} if gates else {}
        return own, every

    def initial(self) -> tuple[Tensors, Tensors]:
        """The values of :attr:`experts` and :attr:`gates` before the first :meth:`bind`, for the caller to copy:
        they may share memory with the pool as it was attached."""
        own, every = self._stacks()
        return (
            {key: self._own.pick(stack) for key, stack in own.items()},
            {key: self._all.pick(stack) for key, stack in every.items()},
        )

    @property
    def elements(self) -> int:
        """Numbers that train on this rank."""
        return sum(tensor.numel() for tensor in (*self.experts.values(), *self.gates.values()))

    def bind(self, values: Mapping[str, torch.Tensor]) -> None:
        """Let the layers compute with these values until the next call."""
        context = self.context
        for key in (*self.experts, *self.gates):
            site, _, kind = key.rpartition(".")
            if kind == "gate":
                context.gates[site] = self._all.merge(values[key], self._rest[key])
            else:
                setattr(context.banks[site], kind, self._own.merge(values[key], self._rest[key]))
        if self.gates:
            context.prototypes.forget_gates()
        if self.experts and context.dispatch is not None:
            # A forward without gradients would keep what it fetched.
            context.dispatch.cache.clear()

    def part(self, key: str, expert: int, whole: torch.Tensor) -> torch.Tensor | None:
        """The view of one trained expert in a parameter, without padding; None if it does not adapt the site.

        Of the gates of experts that live on other ranks this rank does not know which sites these adapt.
        """
        site, _, kind = key.rpartition(".")
        rank = None
        if expert in self._position:
            rank = self.context.banks[site].ranks[self._position[expert]]
        if rank == 0:
            return None
        if kind == "gate":
            return whole[self._row_of_chosen[expert]]
        return whole[self._row_of_own[expert], :rank]


def _device(stacks: Tensors) -> torch.device:
    return next((stack.device for stack in stacks.values()), torch.device("cpu"))
