"""The queries' part of the routing scores, from their cosines with the experts' descriptions.

Legend: B queries, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.routing.combine import exclusion, global_bias, shortlist
from glider_dist.routing.local import at_least_fp32
from glider_dist.routing.strategies import needs_scores, strategy_of


@dataclass(frozen=True)
class QueryScores:
    """What the forwards of some queries need of them.

    Attributes:
        bias_BE: ``[B, E]`` fp32 (or fp64), added to the local scores of each token, -inf where an expert may not
            serve; None: nothing is added.
        wanted_E: ``[E]`` bool, the experts that some query may use.
        excludes: whether a query has fewer experts than places, so that places stay unused.
    """

    bias_BE: torch.Tensor | None
    wanted_E: torch.Tensor
    excludes: bool

    @staticmethod
    def of(similarity_BE: torch.Tensor, router: RouterConfig, general: Sequence[int]) -> QueryScores:
        """From cosines ``c_e`` ``[B, E]``; -inf excludes an expert for a query, as do ``general`` and a shortlist.

        Raises:
            GliderError: the router's alphas or threshold are not set.
        """
        similarity_BE = at_least_fp32(similarity_BE)
        if general:
            chosen = torch.tensor(list(general), device=similarity_BE.device)
            similarity_BE = similarity_BE.index_fill(1, chosen, float("-inf"))
        if router.shortlist is not None:
            similarity_BE = shortlist(similarity_BE, router.shortlist)
        if router.alpha_in is None or router.alpha_out is None or router.threshold is None:
            raise GliderError("the router's alpha_in, alpha_out and threshold are not set")
        excluded_BE = similarity_BE.isneginf()
        bias_BE = None
        if strategy_of(router).uses_global:
            bias_BE = global_bias(similarity_BE, router.alpha_in, router.alpha_out, router.threshold)
        elif needs_scores(router) or bool(excluded_BE.any()):
            bias_BE = exclusion(similarity_BE)
        # Experts that are excluded take no place where enough others remain; then no place is unused.
        places = router.top_k if router.top_p is None else similarity_BE.shape[1]
        excludes = bool(((~excluded_BE).sum(1) < places).any())
        return QueryScores(bias_BE, (~excluded_BE).any(0), excludes)
