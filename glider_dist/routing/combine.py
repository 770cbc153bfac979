"""Global scores: how far each query's own weight α goes, and which experts it may use at all.

Legend: B queries, E experts.
"""

from __future__ import annotations

import torch


def global_bias(similarity_BE: torch.Tensor, alpha_in: float, alpha_out: float, threshold: float) -> torch.Tensor:
    """``α · c_e`` with α = ``alpha_in`` where the best cosine is over ``threshold``, else ``alpha_out``.

    Args:
        similarity_BE: ``[B, E]`` cosines between the query and the experts' descriptions; -inf excludes an
            expert for that query, and excluded experts do not count for the threshold.

    Returns:
        ``[B, E]``, -inf where excluded.
    """
    excluded_BE = similarity_BE.isneginf()
    best_B1 = similarity_BE.amax(-1, keepdim=True)
    alpha_B1 = torch.where(best_B1 > threshold, alpha_in, alpha_out).to(similarity_BE.dtype)
    # 0 * -inf would be NaN.
    bias_BE = alpha_B1 * similarity_BE.masked_fill(excluded_BE, 0.0)
    return bias_BE.masked_fill(excluded_BE, float("-inf"))


def exclusion(similarity_BE: torch.Tensor) -> torch.Tensor:
    """0, and -inf where an expert is excluded: what the global part adds under routers without one; ``[B, E]``."""
    excluded_BE = similarity_BE.isneginf()
    return torch.zeros_like(similarity_BE).masked_fill(excluded_BE, float("-inf"))


def shortlist(similarity_BE: torch.Tensor, size: int) -> torch.Tensor:
    """Keep each query's ``size`` nearest experts; -inf for the others; ``[B, E]``."""
    size = min(size, similarity_BE.shape[1])
    nearest = similarity_BE.topk(size, dim=-1)
    return torch.full_like(similarity_BE, float("-inf")).scatter(1, nearest.indices, nearest.values)
