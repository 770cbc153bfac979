"""The routing strategies by name, as data: which local score, whether the global one counts, or neither.

A strategy turns local scores ``l`` and the query's global bias ``α c`` into ``z = l + α c`` and from there into
a Route by top-k or top-p. The static ones name their single expert without looking at a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.routing.local import arrow_scores, gate_scores, normalised
from glider_dist.routing.route import Route, top_k_route, top_p_route


@dataclass(frozen=True)
class Strategy:
    """``local``: prototypes compared with tokens; ``uses_global``: needs query scores; ``static``: fixed."""

    local: Literal["gate", "arrow"] | None = None
    uses_global: bool = False
    static: Literal["none", "merged", "assigned"] | None = None


STRATEGIES = {
    "glider": Strategy("gate", uses_global=True),
    "phatgoose": Strategy("gate"),
    "global": Strategy(uses_global=True),
    "arrow": Strategy("arrow"),
    "merged": Strategy(static="merged"),
    "oracle": Strategy(static="assigned"),
    "base": Strategy(static="none"),
}

PUBLISHED = {"alpha_in": 100.0, "alpha_out": 3.0, "threshold": 0.5}


def resolved(config: RouterConfig, calibration: dict[str, Any]) -> tuple[RouterConfig, bool]:
    """Fill ``alpha_in``, ``alpha_out`` and ``threshold`` from the calibration, else from :data:`PUBLISHED`.

    Returns:
        The full config, and whether published defaults had to stand in.
    """
    open_keys = [key for key in PUBLISHED if getattr(config, key) is None]
    values = {key: float(calibration.get(key, PUBLISHED[key])) for key in open_keys}
    filled: Any = values
    return replace(config, **filled), any(key not in calibration for key in open_keys)


def check_router(config: RouterConfig, num_experts: int) -> Strategy:
    """Raises GliderError if the strategy is unknown or asks for more experts than there are."""
    if config.kind not in STRATEGIES:
        raise GliderError(f"router.kind={config.kind!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    strategy = STRATEGIES[config.kind]
    if strategy.static is None and config.top_p is None and config.top_k > num_experts:
        raise GliderError(f"router.top_k={config.top_k} is larger than the pool, which has {num_experts} experts")
    return strategy


def route_tokens(
    strategy: Strategy,
    config: RouterConfig,
    x_Td: torch.Tensor,
    normalised_Td: torch.Tensor | None,
    prototypes_Ed: torch.Tensor | None,
    bias_TE: torch.Tensor | None,
    eligible_E: torch.Tensor | None,
) -> Route:
    """Choose experts for T tokens at one site.

    Args:
        x_Td: ``[T, d]`` the tokens (arrow scores these).
        normalised_Td: ``[T, d]`` their LayerNorm if already known.
        prototypes_Ed: ``[E, d]`` fp32 prototypes of the strategy's kind, or None if it has no local part.
        bias_TE: ``[T, E]`` the global part ``α c``, or None.
        eligible_E: ``[E]`` bool, experts that adapt this site; None if all do.
    """
    scores_TE: torch.Tensor | None = None
    if strategy.local == "gate" and prototypes_Ed is not None:
        scores_TE = gate_scores(normalised(x_Td) if normalised_Td is None else normalised_Td, prototypes_Ed)
    elif strategy.local == "arrow" and prototypes_Ed is not None:
        scores_TE = arrow_scores(x_Td, prototypes_Ed, config.temperature)
    if bias_TE is not None:
        scores_TE = bias_TE if scores_TE is None else scores_TE + bias_TE
    if scores_TE is None:
        raise GliderError(
            f"router {config.kind!r} needs the queries' similarities to the experts; "
            "run the model inside glider_dist.query_scores(model, similarity)"
        )
    if eligible_E is not None:
        scores_TE = scores_TE.masked_fill(~eligible_E, float("-inf"))
    if config.top_p is not None:
        return top_p_route(scores_TE, config.top_p, config.top_p_max)
    return top_k_route(scores_TE, config.top_k)
