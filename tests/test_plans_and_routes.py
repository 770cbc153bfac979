"""Plans and routes as properties."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from routed_models import NEVER

from glider_dist.lora.plan import count_rows, plan_rows
from glider_dist.routing.route import Route, top_k_route, top_p_route


@st.composite
def routes(draw: Any) -> tuple[Route, int]:
    tokens, experts = draw(st.integers(0, 12)), draw(st.integers(1, 9))
    places = draw(st.integers(1, experts))
    ragged = draw(st.booleans())
    rows = [draw(st.permutations(range(experts)))[:places] for _ in range(tokens)]
    ids = torch.tensor(rows, dtype=torch.int64).view(tokens, places)
    if ragged:
        used = draw(st.lists(st.booleans(), min_size=tokens * places, max_size=tokens * places))
        ids = ids.masked_fill(~torch.tensor(used, dtype=torch.bool).view(tokens, places), -1)
    weights = torch.arange(tokens * places, dtype=torch.float32).view(tokens, places) + 1
    return Route(ids, weights, ragged), experts


@settings(max_examples=100, deadline=None)
@given(routes())
def test_a_plan_holds_every_used_place_once_sorted_by_expert_and_stable(case):
    route, experts = case
    plan = plan_rows(route, experts)
    places = route.expert_ids.shape[1]
    expected = sorted(
        (expert, token, place)
        for token, row in enumerate(route.expert_ids.tolist())
        for place, expert in enumerate(row)
        if expert >= 0
    )
    # The weight tells the place: it was numbered.
    rows = zip(plan.expert.tolist(), plan.token.tolist(), plan.weight.tolist(), strict=True)
    assert [(e, t, int(w) - 1 - t * places) for e, t, w in rows] == expected
    counts = Counter(expert for expert, _, _ in expected)
    counted = count_rows(route.expert_ids, experts, route.ragged)
    assert counted.tolist() == [counts[e] for e in range(experts)]
    assert count_rows(route.expert_ids, experts, route.ragged, counted) is counted
    assert counted.tolist() == [2 * counts[e] for e in range(experts)]
    assert plan.ends.tolist() == [sum(counts[i] for i in range(e + 1)) for e in range(experts)]
    assert plan.ends.dtype == torch.int32


@st.composite
def score_rows(draw: Any) -> torch.Tensor:
    tokens, experts = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    value = st.one_of(st.floats(-6, 6, width=32), st.just(NEVER))
    rows = draw(st.lists(st.lists(value, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens))
    return torch.tensor(rows, dtype=torch.float64)


@settings(max_examples=150, deadline=None)
@given(score_rows(), st.floats(0.01, 1.0), st.integers(1, 8))
def test_top_p_keeps_the_smallest_set_that_reaches_p(scores, p, at_most):
    route = top_p_route(scores, p, at_most)
    assert route.ragged
    assert route.expert_ids.shape == (scores.shape[0], min(at_most, scores.shape[1]))
    for row, ids, weights in zip(scores, route.expert_ids, route.weights, strict=True):
        ranked = sorted((float(z) for z in row if z != NEVER), reverse=True)
        total = sum(math.exp(z) for z in ranked)
        above = [sum(math.exp(z) for z in ranked[:i]) / total for i in range(len(ranked))]
        assume(all(abs(mass - p) > 1e-9 for mass in above))
        kept = [z for z, mass in zip(ranked, above, strict=True) if mass < p][:at_most]
        used = ids >= 0
        assert row[ids[used]].tolist() == pytest.approx(kept, abs=1e-12)
        assert len(set(ids[used].tolist())) == len(kept)
        assert not weights[~used].any()
        reference = [math.exp(z) / sum(math.exp(q) for q in kept) for z in kept]
        assert weights[used].tolist() == pytest.approx(reference, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(score_rows(), st.integers(1, 8))
def test_top_k_is_the_softmax_over_all_cut_to_k_and_renormalised(scores, k):
    k = min(k, scores.shape[1])
    route = top_k_route(scores, k)
    assert route.expert_ids.shape == (scores.shape[0], k)
    for row, ids, weights in zip(scores, route.expert_ids, route.weights, strict=True):
        used = (ids >= 0) & (row[ids] != NEVER)
        assert len(set(ids[used].tolist())) == used.sum() == min(k, int((row != NEVER).sum()))
        assert not weights[~used].any()
        if not used.any():
            continue
        cut = row.softmax(0).sort(descending=True).values[:k]
        assert torch.allclose(weights, cut / cut.sum(), rtol=0, atol=1e-12)
