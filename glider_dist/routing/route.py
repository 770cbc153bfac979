"""Route: which experts serve each token, with which weight. Everything after it is blind to the reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glider_dist.routing.local import at_least_fp32


@dataclass(frozen=True)
class Route:
    """T tokens, K places.

    Attributes:
        expert_ids: ``[T, K]`` int64; -1 where a place is unused (only if ``ragged``).
        weights: ``[T, K]`` fp32 (fp64 for fp64 inputs); 0 where unused.
        ragged: True if places may be unused.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor
    ragged: bool = False


def top_k_route(scores_TE: torch.Tensor, k: int, excludes: bool = True) -> Route:
    """Softmax over the k largest scores (GLIDER; equal to softmax over all, top-k, renormalise).

    Args:
        excludes: whether some token has fewer than k scores that are not -inf. An expert with -inf never
            serves: the token's place stays unused. False promises every token k others, whatever else is -inf;
            all places are used then, and the plan needs no host sync.
    """
    top_TK, ids_TK = scores_TE.topk(min(k, scores_TE.shape[1]), dim=-1)
    if not excludes:
        return Route(ids_TK, top_TK.softmax(-1))
    return Route(ids_TK.masked_fill(top_TK.isneginf(), -1), _weights(top_TK), ragged=True)


def top_p_route(scores_TE: torch.Tensor, p: float, at_most: int) -> Route:
    """Keep the smallest set of experts whose softmax mass reaches p, at least one, at most ``at_most``.

    GLIDER (``peft/tuners/molora/layers.py:371-388``): sort ascending, drop experts whose cumulative
    probability is at most 1 - p, softmax over the rest.
    """
    probability_TE = scores_TE.softmax(-1)
    ascending_TE, order_TE = probability_TE.sort(dim=-1, stable=True)
    drop_TE = ascending_TE.cumsum(-1) <= 1 - p
    drop_TE[:, -1] = False
    places = min(at_most, scores_TE.shape[1])
    keep_TK = ~drop_TE.flip(-1)[:, :places]
    ids_TK = order_TE.flip(-1)[:, :places]
    kept_TK = scores_TE.gather(1, ids_TK).masked_fill(~keep_TK, float("-inf"))
    return Route(ids_TK.masked_fill(kept_TK.isneginf(), -1), _weights(kept_TK), ragged=True)


def assigned_route(ids_T: torch.Tensor, x_Td: torch.Tensor, gates_Ed: torch.Tensor | None) -> Route:
    """One expert per token with weight 1, or ``σ(v·u)`` with the raw gate vector (gate training).

    Args:
        ids_T: ``[T]`` int64 the expert of each token.
        x_Td: ``[T, d]`` the tokens.
        gates_Ed: ``[E, d]`` raw gate vectors, or None.
    """
    if gates_Ed is None:
        weight_T = torch.ones(ids_T.shape, dtype=at_least_fp32(x_Td[:0]).dtype, device=x_Td.device)
    else:
        weight_T = (at_least_fp32(x_Td) * gates_Ed[ids_T]).sum(-1).sigmoid()
    return Route(ids_T[:, None], weight_T[:, None])


def _weights(scores_TK: torch.Tensor) -> torch.Tensor:
    # The softmax of nothing but -inf is NaN, and so is its gradient.
    unused_TK = scores_TK.isneginf()
    finite_TK = scores_TK.masked_fill(unused_TK, torch.finfo(scores_TK.dtype).min)
    return finite_TK.softmax(-1).masked_fill(unused_TK, 0.0)
