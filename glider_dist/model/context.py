"""What a batch needs besides its hidden states: the experts, the router, and each query's global scores.

One context belongs to one attached model. It lives outside the module tree, so that the base's engine (ZeRO 3)
and its state dict never see the experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.lora.bank import SiteBank, merge_site
from glider_dist.model.tokens import Stacks, Tokens
from glider_dist.routing.combine import global_bias, shortlist
from glider_dist.routing.local import arrow_prototypes, at_least_fp32, gate_prototypes, normalised
from glider_dist.routing.route import Route
from glider_dist.routing.strategies import STRATEGIES, check_router, route_tokens


class RoutingContext:
    """Experts, router and per-batch scores of one attached model.

    Attributes:
        names: the experts' names, in the order of their ids.
        banks: ``{site: SiteBank}``.
        gates: ``{site: [E, d_in]}`` fp32 raw gate vectors; empty if the pool has none.
        stacks: the tokens of the running forward.
        gated: weight assigned experts with ``σ(v·u)`` (gate training).
        counts: ``{site: [E]}`` tokens per expert since the last reset.
    """

    def __init__(
        self,
        model: nn.Module,
        names: tuple[str, ...],
        banks: dict[str, SiteBank],
        gates: dict[str, torch.Tensor],
    ):
        self.names = names
        self.banks = banks
        self.gates = gates
        self.stacks = Stacks(model)
        self.gated = False
        self.counts: dict[str, torch.Tensor] = {}
        self.router = RouterConfig(kind="base")
        self.strategy = STRATEGIES["base"]
        self._prototypes: dict[tuple[str, str], torch.Tensor] = {}
        self._merged: dict[str, SiteBank] = {}
        self._bias_BE: torch.Tensor | None = None
        self._assigned_B: torch.Tensor | None = None
        self._last_input: tuple[torch.Tensor, Tokens, torch.Tensor] | None = None

    def use(self, router: RouterConfig) -> None:
        """Switch the router; prototypes are computed once per kind.

        Raises:
            GliderError: gates are needed and missing, or top_k exceeds the pool.
        """
        strategy = check_router(router, len(self.names))
        if strategy.local == "gate" and not self.gates:
            raise GliderError(
                f"router {router.kind!r} needs a gate for every expert, but the pool has none or lacks some; "
                "run train-gates, or choose a router without gates such as router.kind=arrow"
            )
        self.router, self.strategy = router, strategy
        self._bias_BE = None

    @property
    def always_on(self) -> bool:
        """True if a bank of one expert serves every token, so that nothing need be routed."""
        return self.strategy.static == "merged" or (self._assigned_B is not None and len(self.names) == 1)

    def bank(self, site: str) -> SiteBank | None:
        """The experts to compute at this site now, or None for the base alone."""
        if self._assigned_B is not None:
            return self.banks[site]
        if self.strategy.static == "none":
            return None
        if self.strategy.static == "assigned":
            raise GliderError(
                "router 'oracle' needs to be told: use glider_dist.assign_experts(model, expert_ids)"
            )
        if self.strategy.static == "merged":
            if site not in self._merged:
                with torch.inference_mode(False), torch.no_grad():
                    self._merged[site] = merge_site(self.banks[site])
            return self._merged[site]
        return self.banks[site]

    @contextlib.contextmanager
    def scores(self, similarity_BE: torch.Tensor) -> Iterator[None]:
        """Set the queries' cosines ``c_e`` for the forwards inside; see :func:`glider_dist.query_scores`."""
        if similarity_BE.ndim != 2 or similarity_BE.shape[1] != len(self.names):
            raise GliderError(
                f"similarity must be [queries, {len(self.names)}] for this pool, "
                f"but is {list(similarity_BE.shape)}"
            )
        before = self._bias_BE
        similarity_BE = at_least_fp32(similarity_BE)
        if self.router.shortlist is not None:
            similarity_BE = shortlist(similarity_BE, self.router.shortlist)
        router = self.router
        if router.alpha_in is None or router.alpha_out is None or router.threshold is None:
            raise GliderError("the router's alpha_in, alpha_out and threshold are not set")
        self._bias_BE = global_bias(similarity_BE, router.alpha_in, router.alpha_out, router.threshold)
        try:
            yield
        finally:
            self._bias_BE = before

    @contextlib.contextmanager
    def assigned(self, expert_B: torch.Tensor) -> Iterator[None]:
        """Serve query b by expert ``expert_B[b]`` alone, whatever the router; ids follow :attr:`names`."""
        before, self._assigned_B = self._assigned_B, expert_B
        try:
            yield
        finally:
            self._assigned_B = before

    def route(self, site: str, x: torch.Tensor, tokens: Tokens, bank: SiteBank) -> Route:
        """Choose experts for the real tokens of one layer's input ``[..., d]``."""
        x_Td = x.reshape(-1, x.shape[-1])
        if self._assigned_B is not None:
            kept_Td = x_Td if tokens.keep is None else x_Td[tokens.keep]
            gates = self.gates[site] if self.gated else None
            row_T = _query_of(tokens, self._assigned_B.shape[0])
            return assigned_route(self._assigned_B, row_T, kept_Td, gates)
        bias_TE = None
        if self.strategy.uses_global and self._bias_BE is not None:
            bias_TE = self._bias_BE[_query_of(tokens, self._bias_BE.shape[0])]
        elif self.strategy.uses_global:
            raise GliderError(
                f"router {self.router.kind!r} needs the queries' similarities to the experts; "
                "run the model inside glider_dist.query_scores(model, similarity)"
            )
        kept_Td, normalised_Td = x_Td, None
        if self.strategy.local == "gate":
            normalised_Td = self._normalised(x, x_Td, tokens)
        elif tokens.keep is not None:
            kept_Td = x_Td[tokens.keep]
        eligible = None if bank.all_eligible else bank.eligible
        prototypes = self._site_prototypes(site)
        return route_tokens(self.strategy, self.router, kept_Td, normalised_Td, prototypes, bias_TE, eligible)

    def gate_weight(self, site: str, x_Td: torch.Tensor) -> torch.Tensor:
        """``σ(v·u)`` of a bank's only expert; ``[T]``."""
        x_Td = at_least_fp32(x_Td)
        return (x_Td @ self.gates[site][0].to(x_Td.dtype)).sigmoid()

    def count(self, site: str, counts_E: torch.Tensor) -> None:
        # Not again when activations are recomputed in a backward pass.
        if torch._C._current_graph_task_id() == -1:
            self.counts[site] = self.counts[site] + counts_E if site in self.counts else counts_E

    def _normalised(self, x: torch.Tensor, x_Td: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        # q, k and v (gate and up) are handed the same tensor object: its LayerNorm is computed once.
        last = self._last_input
        if last is None or last[0] is not x or last[1] is not tokens:
            last = (x, tokens, normalised(x_Td if tokens.keep is None else x_Td[tokens.keep]))
            self._last_input = last
        return last[2]

    def _site_prototypes(self, site: str) -> torch.Tensor | None:
        if self.strategy.local is None:
            return None
        key = (self.strategy.local, site)
        if key not in self._prototypes:
            bank = self.banks[site]
            # Kept for later forwards, which may need gradients even if this one does not.
            with torch.inference_mode(False), torch.no_grad():
                made = (
                    gate_prototypes(self.gates[site])
                    if key[0] == "gate"
                    else arrow_prototypes(bank.A, bank.B.transpose(1, 2))
                )
            self._prototypes[key] = made.to(bank.A.device)
        return self._prototypes[key]


def assigned_route(
    expert_B: torch.Tensor, row_T: torch.Tensor, x_Td: torch.Tensor, gates_Ed: torch.Tensor | None
) -> Route:
    """One expert per query with weight 1, or ``σ(v·u)`` with the raw gate vector (gate training).

    Args:
        expert_B: ``[B]`` expert of each query.
        row_T: ``[T]`` query of each token.
        x_Td: ``[T, d]`` the tokens.
        gates_Ed: ``[E, d]`` raw gate vectors, or None.
    """
    ids_T = expert_B[row_T]
    if gates_Ed is None:
        weight_T = torch.ones(ids_T.shape, dtype=at_least_fp32(x_Td[:0]).dtype, device=x_Td.device)
    else:
        weight_T = (at_least_fp32(x_Td) * gates_Ed[ids_T]).sum(-1).sigmoid()
    return Route(ids_T[:, None], weight_T[:, None])


def _query_of(tokens: Tokens, queries: int) -> torch.Tensor:
    """The query of each token; generation repeats each query once per beam."""
    if tokens.batch == queries:
        return tokens.row
    if queries == 0 or tokens.batch % queries:
        raise GliderError(f"scores were given for {queries} queries, but the batch has {tokens.batch} rows")
    return tokens.row // (tokens.batch // queries)
