"""Which experts serve which token: layers they lack, queries that exclude them, calibration, shortlists."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from routed_cases import CHOICES, dense, error, make_case
from routed_models import ALPHAS, NEVER

import glider_dist as gd
from glider_dist.model.attach import context_of


@pytest.mark.parametrize("choice", ["top2", "topp.9"])
def test_an_expert_without_the_layer_never_serves_there(choice, way):
    case = make_case(ranks=(4, 0, 0))
    model, bank = case.attached(torch.float64)
    with torch.no_grad():  # would show if it were used
        bank.A[1:] = 1e3
        bank.B[1:] = 1e3
        bank.scale[1:] = 1.0
        context_of(model).gates["layer"][1:] = case.x[0, 3] * 10
    gd.set_router(model, gd.RouterConfig(kind="phatgoose", **CHOICES[choice]))
    one = torch.ones((), dtype=torch.float64)
    ours = model(case.x.detach(), attention_mask=case.mask)
    assert error(ours, dense(case, lambda query, u: {0: one})) < 1e-10


@pytest.mark.parametrize("choice", ["top1", "top2", "topp.9"])
@pytest.mark.parametrize("kind", ["glider", "global"])
def test_a_similarity_of_minus_infinity_excludes_an_expert_for_that_query_only(kind, choice, way):
    case = make_case(ranks=(4, 4, 4))
    similarity = torch.tensor([[0.9, NEVER, 0.1], [0.9, 0.8, NEVER], [NEVER, NEVER, 0.1]])
    model, bank = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind=kind, alpha_in=1.0, alpha_out=1.0, threshold=0.5, **CHOICES[choice]))
    for query in range(3):
        with gd.query_scores(model, similarity[query : query + 1]):
            alone = model(case.x.detach()[query : query + 1], attention_mask=case.mask[query : query + 1])
        excluded = similarity[query] == NEVER
        with torch.no_grad():
            kept = bank.B.clone()
            bank.B[excluded] = 1e3
            with gd.query_scores(model, similarity[query : query + 1]):
                again = model(case.x.detach()[query : query + 1], attention_mask=case.mask[query : query + 1])
            bank.B.copy_(kept)
        assert torch.equal(alone, again)
        assert not torch.allclose(alone, case.layer(case.x[query : query + 1]))


@pytest.mark.parametrize("choice", ["top2", "topp.9"])
def test_stats_do_not_count_an_expert_that_is_excluded_or_lacks_the_layer(choice, way):
    case = make_case(ranks=(4, 4, 0), mask=("0111", "1111", "1100"))
    similarity = torch.tensor([[0.9, NEVER, 0.1], [0.2, 0.2, NEVER], [NEVER, NEVER, 0.1]])
    model, _ = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind="glider", **ALPHAS, **CHOICES[choice]))
    with gd.query_scores(model, similarity):
        model(case.x, attention_mask=case.mask)
    counts = gd.routing_stats(model)["layer"].tolist()
    assert counts[2] == 0
    if choice == "top2":
        assert counts == [3 + 4, 4, 0]
    else:
        assert counts[0] >= 3


def test_stats_count_a_chosen_expert_even_if_its_weight_underflows():
    case = make_case(ranks=(4, 4), mask=("1111",))
    model, _ = case.attached(torch.float32)
    gd.set_router(model, gd.RouterConfig(kind="glider", alpha_in=1000.0, alpha_out=1000.0, threshold=0.5, top_k=2))
    with gd.query_scores(model, torch.tensor([[0.9, 0.1]])):
        model(case.x.detach().float(), attention_mask=case.mask)
    assert gd.routing_stats(model)["layer"].tolist() == [4, 4]


@pytest.mark.parametrize("choice", ["top1", "top2", "topp.9"])
@pytest.mark.parametrize("kind", ["glider", "global"])
def test_a_query_that_may_use_no_expert_gets_the_base_output_and_finite_gradients(kind, choice, way):
    case = make_case(ranks=(4, 0, 3))
    similarity = torch.tensor([[0.9, 0.1, 0.2], [NEVER, 0.9, NEVER], [NEVER, NEVER, NEVER]]).requires_grad_()
    model, bank = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind=kind, **ALPHAS, **CHOICES[choice]))
    x = case.x.detach().requires_grad_()
    with gd.query_scores(model, similarity):
        y = model(x, attention_mask=case.mask)
    base = case.layer(case.x).detach()
    assert torch.equal(y[1:].detach(), base[1:])
    assert not torch.allclose(y[0, 2:].detach(), base[0, 2:])
    y.sum().backward()
    for name, leaf in {"x": x, "A": bank.A, "B": bank.B, "similarity": similarity}.items():
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all(), name
    assert torch.allclose(x.grad[1:], case.layer.weight.sum(0).expand_as(x.grad[1:]))


def test_alpha_switches_per_query_only_above_the_threshold():
    case = make_case(ranks=(4, 4, 4), mask=("111",) * 3)
    similarity = torch.tensor([[0.5, 0.1, 0.3], [0.5 + 1e-6, 0.1, 0.3], [0.9, 0.1, 0.3]])
    model, _ = case.attached(torch.float64)
    x = case.x.detach()

    def run(alpha_in: float, alpha_out: float) -> torch.Tensor:
        gd.set_router(
            model, gd.RouterConfig(kind="glider", alpha_in=alpha_in, alpha_out=alpha_out, threshold=0.5, top_k=3)
        )
        with gd.query_scores(model, similarity):
            return model(x)

    both, high, low = run(7.0, 0.3), run(7.0, 7.0), run(0.3, 0.3)
    assert torch.equal(both[0], low[0])
    assert torch.equal(both[1:], high[1:])
    assert not torch.allclose(high, low)


def test_alpha_zero_equals_phatgoose():
    case = make_case()
    case.similarity = case.similarity.detach().masked_fill(case.similarity == NEVER, 0.3)
    model, _ = case.attached(torch.float64)
    outputs = []
    for kind in ("glider", "phatgoose"):
        gd.set_router(model, gd.RouterConfig(kind=kind, alpha_in=0.0, alpha_out=0.0, threshold=0.5))
        with gd.query_scores(model, case.similarity):
            outputs.append(model(case.x.detach(), attention_mask=case.mask))
    assert torch.equal(*outputs)


def test_equal_gates_and_a_large_alpha_equal_the_globally_nearest_expert():
    case = make_case(ranks=(4, 4, 4, 4))
    model, _ = case.attached(torch.float64)
    gates = context_of(model).gates["layer"]
    gates.copy_(gates[:1].expand_as(gates).clone())
    gd.set_router(model, gd.RouterConfig(kind="glider", alpha_in=1e4, alpha_out=1e4, threshold=0.5))
    similarity = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.2, 0.1, 0.0, 0.3], [0.3, 0.2, 0.1, 0.0]])
    with gd.query_scores(model, similarity):
        routed = model(case.x.detach(), attention_mask=case.mask)
    with gd.assign_experts(model, similarity.argmax(1)):
        assigned = model(case.x.detach(), attention_mask=case.mask)
    assert torch.allclose(routed, assigned, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["glider", "global"])
def test_a_shortlist_equals_excluding_every_other_expert(kind):
    case = make_case(ranks=(4, 4, 4, 4), mask=("111",) * 3)
    similarity = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.2, 0.1, 0.0, 0.3], [0.3, 0.2, 0.1, 0.0]])
    model, _ = case.attached(torch.float64)
    router = gd.RouterConfig(kind=kind, top_k=3, **ALPHAS)
    gd.set_router(model, replace(router, shortlist=2))
    with gd.query_scores(model, similarity):
        short = model(case.x.detach())
    third = similarity.sort(1).values[:, 1:2]
    gd.set_router(model, router)
    with gd.query_scores(model, similarity.masked_fill(similarity <= third, NEVER)):
        assert torch.allclose(model(case.x.detach()), short, rtol=0, atol=1e-12)
    gd.set_router(model, replace(router, shortlist=99))
    with gd.query_scores(model, similarity):
        wide = model(case.x.detach())
    gd.set_router(model, router)
    with gd.query_scores(model, similarity):
        assert torch.equal(model(case.x.detach()), wide)
