"""The routing strategies by name, as data: which local score, whether the global one counts, or neither.

A strategy turns local scores ``l`` and the query's global bias ``α c`` into ``z = l + α c`` and from there into
a Route by top-k or top-p. The static ones name their single expert without looking at a token.

LAG (2507.05346) scores in two stages: Arrow proposes ``lag_candidates`` experts per token, and the largest
``‖s B A x‖`` among them wins. Three things are ours, as the paper serves one expert and by this score alone:
the weights of several are ``softmax(‖s B A x‖ / temperature)``, both stages add ``α c`` under glider, and the
norm includes the factor s, as the expert's output does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.fields import check_numbers
from glider_dist.routing.local import Inputs, arrow_scores, gate_scores
from glider_dist.routing.route import Route, top_k_route, top_p_route

Local = Literal["gate", "activation", "arrow", "lag"]


@dataclass(frozen=True)
class Strategy:
    """``local``: what scores a token; ``uses_global``: needs query scores; ``static``: one fixed expert."""

    local: Local | None = None
    uses_global: bool = False
    static: Literal["none", "merged", "ties", "dare", "assigned"] | None = None

    @property
    def by_weights(self) -> bool:
        """Whether the local score comes from the experts' own weights, so that nothing need be trained."""
        return self.local in ("arrow", "lag")

    @property
    def compares_normalised(self) -> bool:
        """Whether the LayerNorm of the tokens is scored, not the tokens."""
        return self.local in ("gate", "activation")

    @property
    def merges(self) -> bool:
        return self.static in ("merged", "ties", "dare")


STRATEGIES = {
    "glider": Strategy("gate", uses_global=True),
    "phatgoose": Strategy("gate"),
    "global": Strategy(uses_global=True),
    "arrow": Strategy("arrow"),
    "lag": Strategy("lag"),
    "average_activation": Strategy("activation"),
    "merged": Strategy(static="merged"),
    "ties": Strategy(static="ties"),
    "dare": Strategy(static="dare"),
    "oracle": Strategy(static="assigned"),
    "base": Strategy(static="none"),
}
GLIDER_LOCAL: dict[str, Local] = {"gate": "gate", "arrow": "arrow", "lag": "lag"}

PUBLISHED = {"alpha_in": 100.0, "alpha_out": 3.0, "threshold": 0.5}


def local_scores(config: RouterConfig) -> list[str | float]:
    """What a router's local scores are, as far as alpha and threshold depend on it; [] if it has none."""
    strategy = strategy_of(config)
    if strategy.local is None:
        return []
    return [strategy.local, *([config.temperature, *sorted(config.general)] if strategy.by_weights else [1.0])]


def resolved(config: RouterConfig, calibration: dict[str, Any]) -> tuple[RouterConfig, bool]:
    """Fill ``alpha_in``, ``alpha_out`` and ``threshold`` from the calibration, else from :data:`PUBLISHED`.

    Returns:
        The full config, and whether published defaults had to stand in.

    Raises:
        GliderError: if one that is needed is no number in the calibration.
    """
    open_keys = [key for key in PUBLISHED if getattr(config, key) is None]
    for key in open_keys:
        if not isinstance(value := calibration.get(key, 0.0), int | float) or not math.isfinite(value):
            raise GliderError(f"calibration.json has {key}={value!r}, not a number; run calibrate again")
    values = {key: float(calibration.get(key, PUBLISHED[key])) for key in open_keys}
    filled: Any = values
    return replace(config, **filled), any(key not in calibration for key in open_keys)


def strategy_of(config: RouterConfig) -> Strategy:
    """The strategy of ``kind``, and of ``local`` for glider.

    Raises:
        GliderError: if either is unknown.
    """
    if config.kind not in STRATEGIES:
        raise GliderError(f"router.kind={config.kind!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    if config.local not in GLIDER_LOCAL:
        raise GliderError(f"router.local={config.local!r} is unknown; choose one of {', '.join(GLIDER_LOCAL)}")
    strategy = STRATEGIES[config.kind]
    return replace(strategy, local=GLIDER_LOCAL[config.local]) if config.kind == "glider" else strategy


def needs_scores(config: RouterConfig) -> bool:
    """Whether queries need their cosines: for a global score, or to shortlist experts for a local one.

    Raises:
        GliderError: as :func:`strategy_of`.
    """
    strategy = strategy_of(config)
    return strategy.uses_global or (strategy.static is None and config.shortlist is not None)


def check_router(config: RouterConfig, num_experts: int) -> Strategy:
    """Raises GliderError if the strategy is unknown, a number is out of bounds, or there are too few experts."""
    strategy = strategy_of(config)
    check_numbers(config, "router.")
    if strategy.static is not None:
        return strategy
    general = len(config.general) if strategy.by_weights else 0
    if general >= num_experts:
        raise GliderError(f"router.general names all {num_experts} experts of the pool; leave some to route to")
    if config.top_p is None and config.top_k > num_experts - general:
        besides = f" besides the {general} of router.general" if general else ""
        raise GliderError(
            f"router.top_k={config.top_k} is larger than the pool, "
            f"which has {num_experts - general} experts{besides}"
        )
    if strategy.local == "lag" and config.top_p is None and config.top_k > config.lag_candidates:
        raise GliderError(
            f"router.top_k={config.top_k} is larger than router.lag_candidates={config.lag_candidates}"
        )
    return strategy


def check_shared(config: RouterConfig) -> None:
    """Raises GliderError if the strategy needs every expert on each rank."""
    strategy = strategy_of(config)
    if strategy.merges or strategy.local in ("lag", "activation") or (strategy.by_weights and config.general):
        raise GliderError(
            f"router {config.kind!r} needs every expert on each rank; use mesh.expert_parallel=1, or one of "
            "glider, phatgoose, global, arrow and oracle (without router.general)"
        )


def route_tokens(
    strategy: Strategy,
    config: RouterConfig,
    x_Td: torch.Tensor,
    inputs: Inputs | None,
    prototypes_Ed: torch.Tensor | None,
    bias_TE: torch.Tensor | None,
    eligible_E: torch.Tensor | None,
    norms: Callable[[torch.Tensor], torch.Tensor] | None = None,
    excludes: bool = True,
    watch: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Route:
    """Choose experts for T tokens at one site.

    Args:
        x_Td: ``[T, d]`` the tokens (arrow scores these).
        inputs: the same for gate scores, if already known.
        prototypes_Ed: ``[E, d]`` fp32 prototypes of the strategy's kind, or None if it has no local part.
        bias_TE: ``[T, E]`` the global part ``α c``, or without one 0 and -inf (excluded experts); None: neither.
        eligible_E: ``[E]`` bool, experts that adapt this site; None if all do.
        excludes: whether some token has fewer experts that are not -inf in ``bias_TE`` than places, so that
            places stay unused. False promises the opposite, also of a bias with -inf (a shortlist of at least
            ``top_k``): the plan then needs no host sync.
        watch: shown the scores ``[T, E]``, and returns those that decide (joint training).
        norms: for lag, from the candidates ``[T, C]`` int64 to ``‖s B A x‖`` of each ``[T, C]``.
    """
    scores_TE: torch.Tensor | None = None
    if strategy.compares_normalised and prototypes_Ed is not None:
        scores_TE = gate_scores(inputs or Inputs.of(x_Td), prototypes_Ed, bias_TE)
    elif strategy.by_weights and prototypes_Ed is not None:
        scores_TE = arrow_scores(x_Td, prototypes_Ed, config.temperature)
        scores_TE = scores_TE if bias_TE is None else scores_TE + bias_TE
    elif bias_TE is not None:
        scores_TE = bias_TE
    if scores_TE is None:
        raise GliderError(
            f"router {config.kind!r} needs the queries' similarities to the experts; "
            "run the model inside glider_dist.query_scores(model, similarity)"
        )
    if eligible_E is not None:
        scores_TE = scores_TE.masked_fill(~eligible_E, float("-inf"))
    if watch is not None:
        scores_TE = watch(scores_TE)
    if norms is None:
        return _choose(config, scores_TE, excludes or eligible_E is not None)
    candidates = scores_TE.topk(min(config.lag_candidates, scores_TE.shape[1]), dim=-1)
    norm_TC = norms(candidates.indices) / config.temperature
    if bias_TE is not None:
        norm_TC = norm_TC + bias_TE.gather(1, candidates.indices)
    route = _choose(config, norm_TC.masked_fill(candidates.values.isneginf(), float("-inf")), excludes=True)
    ids_TK = candidates.indices.gather(1, route.expert_ids.clamp_min(0))
    return replace(route, expert_ids=ids_TK.masked_fill(route.expert_ids < 0, -1))


def _choose(config: RouterConfig, scores_TE: torch.Tensor, excludes: bool) -> Route:
    if config.top_p is not None:
        return top_p_route(scores_TE, config.top_p, config.top_p_max)
    return top_k_route(scores_TE, config.top_k, excludes)
