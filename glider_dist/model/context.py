"""What a batch needs besides its hidden states: the experts, the router, and each query's global scores.

One context belongs to one attached model. It lives outside the module tree, so that the base's engine (ZeRO 3)
and its state dict never see the experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.lora.bank import SiteBank
from glider_dist.lora.blocks import Blocks
from glider_dist.lora.lag import delta_norms
from glider_dist.lora.merge import merge_banks, subtract_general
from glider_dist.lora.plan import count_rows
from glider_dist.model.prototypes import Prototypes
from glider_dist.model.shared import SharedInputs
from glider_dist.model.tokens import Stacks, Tokens
from glider_dist.parallel.dispatch import Dispatch
from glider_dist.parallel.exchange import in_backward
from glider_dist.pool import ExpertPool
from glider_dist.routing.local import Inputs, at_least_fp32, exact_product
from glider_dist.routing.query_scores import QueryScores
from glider_dist.routing.route import Route, assigned_route
from glider_dist.routing.strategies import (
    STRATEGIES,
    Strategy,
    check_router,
    check_shared,
    needs_scores,
    route_tokens,
)

_T = TypeVar("_T")


class RoutingContext:
    """Experts, router and per-batch scores of one attached model.

    Attributes:
        names: the experts' names, in the order of their ids.
        banks: ``{site: SiteBank}`` of the experts that this rank holds.
        gates: ``{site: [E, d_in]}`` fp32 raw gate vectors; empty if the pool has none.
        stacks: the tokens of the running forward.
        gated: weight assigned experts with ``σ(v·u)`` (gate training).
        counts: ``{site: [E]}`` tokens per expert since the last reset.
        prototypes: what local scores compare tokens with.
        dispatch: how tokens and experts of other ranks meet; None if this rank holds every expert.
        shared: sites that read the same input, which share an exchange.
        blocks: the batch by assigned expert, if there is one and this rank holds every expert.
        watch: shown the scores ``[T, E]`` of each site's tokens, returns those that decide; None: they do.
    """

    def __init__(
        self,
        model: nn.Module,
        names: tuple[str, ...],
        banks: dict[str, SiteBank],
        gates: dict[str, torch.Tensor],
        dispatch: Dispatch | None = None,
        eligible: dict[str, torch.Tensor] | None = None,
    ):
        self.names = names
        self.pool: ExpertPool | None = None
        self.banks = banks
        self.gates = gates
        self.prototypes = Prototypes(gates)
        self.stacks = Stacks(model, self._forget)
        self.dispatch = dispatch
        self.shared = SharedInputs()
        self._eligible = {site: mask for site, mask in (eligible or {}).items() if not bool(mask.all())}
        self._brought: tuple[torch.Tensor, dict[str, SiteBank]] | None = None
        self.gated = False
        self.blocks: Blocks | None = None
        self.watch: Callable[[str, Tokens, torch.Tensor], torch.Tensor] | None = None
        self.counts: dict[str, torch.Tensor] = {}
        self.router = RouterConfig(kind="base")
        self.strategy = STRATEGIES["base"]
        self._general: tuple[int, ...] = ()
        self._active = banks
        self._derived: dict[tuple[object, ...], dict[str, SiteBank]] = {}
        self._scores: QueryScores | None = None
        self._assigned_B: torch.Tensor | None = None
        self._made: dict[str, tuple[tuple[object, ...], Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingContext:
        # The copy's hooks would go on watching for this one.
        raise GliderError(
            "a model with a pool cannot be copied; call glider_dist.detach(model) first, and attach to each copy"
        )

    def use(self, router: RouterConfig) -> None:
        """Switch the router; merged experts, experts less the general ones and prototypes are made once each.

        Raises:
            GliderError: what the router needs is missing (gates, activations, an expert named in ``general``),
                top_k exceeds the pool, or the experts' ranks differ where they may not.
        """
        strategy = check_router(router, len(self.names))
        if self.dispatch is not None:
            check_shared(router)
        if strategy.local == "gate" and not self.gates:
            raise GliderError(
                f"router {router.kind!r} needs a gate for every expert, but the pool has none or lacks some; "
                "run train-gates, or choose a router without gates such as router.kind=arrow"
            )
        general = router.general if strategy.by_weights else []
        unknown = [name for name in general if name not in self.names]
        if unknown:
            raise GliderError(f"router.general names {unknown[0]!r}, but the pool has no such expert")
        chosen = tuple(sorted({self.names.index(name) for name in general}))
        # Kept for later forwards, which may need gradients even if this one does not.
        with torch.inference_mode(False), torch.no_grad():
            active = self._banks_for(strategy, router, chosen)
            if strategy.local == "activation":
                self.prototypes.load_activations(self.banks)
            if strategy.local == "arrow" and self.dispatch is not None:
                # Now, while all ranks are here: they tell each other what they made of their own experts.
                self.prototypes.of("arrow", *next(iter(self.banks.items())), chosen)
        self.router, self.strategy = router, strategy
        self._general, self._active = chosen, active
        self._scores = self._brought = None

    def _banks_for(
        self, strategy: Strategy, router: RouterConfig, general: tuple[int, ...]
    ) -> dict[str, SiteBank]:
        if not strategy.merges and not general:
            return self.banks
        key = (strategy.static, router.merge_density, router.merge_seed, general)
        if key not in self._derived:
            if strategy.static in ("merged", "ties", "dare"):
                self._derived[key] = merge_banks(
                    self.banks, strategy.static, router.merge_density, router.merge_seed
                )
            else:
                self._derived[key] = {
                    site: subtract_general(site, bank, general) for site, bank in self.banks.items()
                }
        return self._derived[key]

    @property
    def always_on(self) -> bool:
        """True if a bank of one expert serves every token, so that nothing need be routed."""
        one = self._assigned_B is not None and len(self.names) == 1 and self.dispatch is None
        return self.strategy.merges or one

    def bank(self, site: str) -> SiteBank | None:
        """The experts to compute at this site now, or None for the base alone."""
        if self._assigned_B is not None:
            return self.banks[site]
        if self.strategy.static == "none":
            return None
        if self._brought is not None:
            return self._brought[1][site]
        if self.strategy.static == "assigned":
            raise GliderError(
                "router 'oracle' needs to be told: use glider_dist.assign_experts(model, expert_ids)"
            )
        return self._active[site]

    @contextlib.contextmanager
    def scores(self, similarity_BE: torch.Tensor) -> Iterator[None]:
        """Set the queries' cosines ``c_e`` for the forwards inside; see :func:`glider_dist.query_scores`."""
        if similarity_BE.ndim != 2 or similarity_BE.shape[1] != len(self.names):
            raise GliderError(
                f"similarity must be [queries, {len(self.names)}] for this pool, "
                f"but is {list(similarity_BE.shape)}"
            )
        before, brought = self._scores, self._brought
        self._scores = QueryScores.of(similarity_BE, self.router, self._general)
        try:
            if self.dispatch is not None and self._lists():
                self._brought = self.dispatch.bring(self._scores.wanted_E, self.banks)
            yield
        finally:
            self._scores, self._brought = before, brought

    def _lists(self) -> bool:
        """Whether shortlists bound what the next forwards need of other ranks' experts."""
        assert self.dispatch is not None
        bounded = self.router.shortlist is not None and self.strategy.static is None
        return bounded and self.dispatch.strategy == "auto" and not self._trains()

    def _trains(self) -> bool:
        return torch.is_grad_enabled() and any(bank.A.requires_grad for bank in self.banks.values())

    @property
    def exchanges(self) -> bool:
        """Whether the layers exchange tokens or experts with other ranks now."""
        return self.dispatch is not None and (self._brought is None or self._assigned_B is not None)

    def exchange(self, stack: str, sites: Sequence[str], x: torch.Tensor) -> list[torch.Tensor]:
        """What all ranks' experts add at each of the sites that read ``x``; ``[T, d_out]`` for T real tokens."""
        assert self.dispatch is not None
        tokens = self.stacks.tokens_of(stack, x)
        x_Td = x.reshape(-1, x.shape[-1])
        x_Td = x_Td if tokens.keep is None else x_Td.index_select(0, tokens.keep)
        routes = [self.route(site, x, tokens, self.banks[site]) for site in sites]
        for site, route in zip(sites, routes, strict=True):
            self.count(site, route.expert_ids, route.ragged)
        return self.dispatch(x_Td, sites, routes, [self.banks[site] for site in sites])

    def local_ids(self, route: Route) -> Route:
        """The route with positions in this forward's banks, if those are a part of the pool."""
        return route if self._brought is None else replace(route, expert_ids=self._brought[0][route.expert_ids])

    @contextlib.contextmanager
    def assigned(self, experts: Sequence[int], device: torch.device) -> Iterator[None]:
        """Serve query b by expert ``experts[b]`` alone, whatever the router; ids follow :attr:`names`."""
        expert_B = torch.tensor(experts, dtype=torch.int64).to(device, non_blocking=True)
        blocks = Blocks.of(experts, len(self.names), device) if self.dispatch is None else None
        before = self._assigned_B, self.blocks
        self._assigned_B, self.blocks = expert_B, blocks
        try:
            yield
        finally:
            self._assigned_B, self.blocks = before

    def _assigned_ids(self, tokens: Tokens) -> torch.Tensor:
        """``[T]`` int64 the expert of each real token under the assignment."""
        expert_B = self._assigned_B
        assert expert_B is not None
        return self._once("ids", (tokens, expert_B), lambda: expert_B[tokens.query_of(expert_B.shape[0])])

    def route(self, site: str, x: torch.Tensor, tokens: Tokens, bank: SiteBank) -> Route:
        """Choose experts for the real tokens of one layer's input ``[..., d]``."""
        x_Td = x.reshape(-1, x.shape[-1])
        if self._assigned_B is not None:
            kept_Td = x_Td if tokens.keep is None else x_Td[tokens.keep]
            gates = self.gates[site] if self.gated else None
            return assigned_route(self._assigned_ids(tokens), kept_Td, gates)
        bias_TE, queries = self._bias(tokens), self._scores
        if bias_TE is None and needs_scores(self.router):
            raise GliderError(
                f"router {self.router.kind!r} needs the queries' similarities to the experts; "
                "run the model inside glider_dist.query_scores(model, similarity)"
            )
        kept_Td, inputs = x_Td, None
        if self.strategy.compares_normalised:
            inputs = self._inputs(x, x_Td, tokens)
        elif tokens.keep is not None:
            kept_Td = x_Td[tokens.keep]
        eligible = None if bank.all_eligible else bank.eligible
        if self.dispatch is not None:
            eligible = self._eligible.get(site)
        prototypes = norms = None
        if self.strategy.local is not None:
            prototypes = self.prototypes.of(self.strategy.local, site, bank, self._general)
        if self.strategy.local == "lag":
            norms = partial(delta_norms, kept_Td, bank, self.prototypes.factors(site, bank, self._general))
        excludes = queries is not None and queries.excludes
        return route_tokens(
            self.strategy,
            self.router,
            kept_Td,
            inputs,
            prototypes,
            bias_TE,
            eligible,
            norms,
            excludes,
            None if self.watch is None else partial(self.watch, site, tokens),
        )

    def gate_weight(self, site: str, x_Td: torch.Tensor) -> torch.Tensor:
        """``σ(v·u)`` of a bank's only expert; ``[T]``."""
        x_Td = at_least_fp32(x_Td)
        return exact_product(x_Td, self.gates[site][0].to(x_Td.dtype)).sigmoid()

    def count(self, site: str, expert_ids: torch.Tensor, ragged: bool = False) -> None:
        """Add rows to those of a site, unless activations are recomputed in a backward pass."""
        if not in_backward():
            self.counts[site] = count_rows(expert_ids, len(self.names), ragged, self.counts.get(site))

    def count_assigned(self, site: str, tokens: Tokens) -> None:
        """Add the real tokens of each assigned expert."""
        self.count(site, self._assigned_ids(tokens))

    def _forget(self) -> None:
        # Activations would else stay until the next forward.
        self._made.clear()
        self.shared.finish()

    def _once(self, what: str, of: tuple[object, ...], make: Callable[[], _T]) -> _T:
        """What several layers of a forward need, made from the same objects once."""
        known = self._made.get(what)
        if known is None or any(a is not b for a, b in zip(known[0], of, strict=True)):
            known = self._made[what] = (of, make())
        found: _T = known[1]
        return found

    def _bias(self, tokens: Tokens) -> torch.Tensor | None:
        """The queries' part of each token's scores ``[T, E]``, the same at all sites of a stack."""
        if self._scores is None or (bias_BE := self._scores.bias_BE) is None:
            return None
        return self._once("bias", (tokens, bias_BE), lambda: bias_BE[tokens.query_of(bias_BE.shape[0])])

    def _inputs(self, x: torch.Tensor, x_Td: torch.Tensor, tokens: Tokens) -> Inputs:
        # q, k and v (gate and up) are handed the same tensor object.
        keep = tokens.keep
        return self._once("inputs", (x, tokens), lambda: Inputs.of(x_Td if keep is None else x_Td[keep]))
