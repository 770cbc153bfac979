"""Excluded and shortlisted experts, under routers without a global score, too."""

from __future__ import annotations

import pytest
import torch

from glider_dist.config import RouterConfig
from glider_dist.routing.combine import exclusion, shortlist
from glider_dist.routing.strategies import needs_scores, route_tokens, strategy_of

NEVER = float("-inf")


@pytest.mark.parametrize("kind", ["phatgoose", "arrow"])
def test_a_local_router_never_chooses_an_excluded_expert(kind: str) -> None:
    torch.manual_seed(0)
    x, prototypes = torch.randn(40, 8), torch.randn(5, 8)
    bias = exclusion(torch.tensor([[0.3, NEVER, 0.9, NEVER, 0.1]])).expand(40, -1)
    config = RouterConfig(kind=kind, top_k=2)
    strategy = strategy_of(config)
    route = route_tokens(strategy, config, x, None, prototypes, bias, None)
    assert set(route.expert_ids.unique().tolist()) == {0, 2, 4}
    # What is left is scored as if the pool held nothing else.
    kept = torch.tensor([0, 2, 4])
    alone = route_tokens(strategy, config, x, None, prototypes[kept], None, None)
    assert torch.equal(route.expert_ids, kept[alone.expert_ids])
    assert torch.allclose(route.weights, alone.weights)


def test_the_exclusion_keeps_nothing_of_the_scores_but_who_is_excluded() -> None:
    assert exclusion(torch.tensor([[0.3, NEVER], [-2.0, 7.0]])).tolist() == [[0.0, NEVER], [0.0, 0.0]]
    assert exclusion(shortlist(torch.tensor([[0.1, 0.7, 0.5]]), 2)).tolist() == [[NEVER, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("kind", "size", "needed"),
    [
        ("glider", None, True),
        ("global", 2, True),
        ("phatgoose", None, False),
        ("phatgoose", 2, True),
        ("arrow", 2, True),
        ("lag", 2, True),
        ("merged", 2, False),
        ("oracle", 2, False),
        ("base", 2, False),
    ],
)
def test_a_shortlist_needs_the_queries_cosines_wherever_tokens_are_routed(
    kind: str, size: int | None, needed: bool
) -> None:
    assert needs_scores(RouterConfig(kind=kind, shortlist=size)) == needed
