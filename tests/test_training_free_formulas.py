"""Routers that need no training, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from routed_models import ALPHAS
from training_free_cases import CASES, MASK, RANKS, WIDTH, Case, distance

import glider_dist as gd
from glider_dist.lora.bank import stack_site
from glider_dist.lora.lag import delta_norms, norm_factors
from glider_dist.pool import SiteLora


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_a_mixed_batch_equals_the_formula(name, dtype, way):
    case = Case()
    router = gd.RouterConfig(temperature=0.7, **{**ALPHAS, **CASES[name]})
    model = case.attached(router, dtype)
    x = case.x.to(dtype).requires_grad_()
    with gd.query_scores(model, case.similarity.to(dtype)):
        ours = model(x, attention_mask=MASK)
    assert distance(ours.double(), case.formula(router)) < (1e-10 if dtype == torch.float64 else 1e-5)
    ours.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_norms_of_candidates_equal_the_deltas_norms():
    case = Case()
    bank = stack_site(case.loras, (WIDTH[1], WIDTH[0]), torch.float64)
    x = case.x.flatten(0, 1)
    candidates = torch.stack(
        [torch.randperm(7, generator=torch.Generator().manual_seed(t))[:3] for t in range(15)]
    )
    norms = delta_norms(x, bank, norm_factors(bank), candidates)
    for t in range(15):
        for c in range(3):
            lora = case.loras[int(candidates[t, c])]
            exact = 0.0 if lora is None else float((lora.scale * (lora.B @ (lora.A @ x[t]))).norm())
            assert float(norms[t, c]) == pytest.approx(exact, rel=1e-10, abs=1e-100)


@pytest.mark.parametrize("name", ["arrow", "lag", "glider lag"])
def test_a_zero_token_has_a_finite_gradient(name):
    model = Case().attached(gd.RouterConfig(**{**ALPHAS, **CASES[name]}))
    x = torch.zeros(1, 2, WIDTH[0], dtype=torch.float64, requires_grad=True)
    with gd.query_scores(model, torch.full((1, len(RANKS)), 0.2, dtype=torch.float64)):
        model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_general_experts_count_neither_for_the_threshold_nor_for_the_shortlist():
    case = Case(ranks=(4, 4, 4, 4))
    router = gd.RouterConfig(kind="glider", local="lag", general=["expert_0"], shortlist=2, **ALPHAS)
    model = case.attached(router)
    case.similarity[:, 0] = 0.99
    general = case.loras[0]
    assert general is not None
    with gd.query_scores(model, case.similarity):
        ours = model(case.x, attention_mask=MASK)
    rest = Case(ranks=(4, 4, 4, 4))
    rest.layer, rest.similarity = case.layer, case.similarity[:, 1:]
    rest.loras = [
        SiteLora(lora.A - general.A, lora.B - general.B, lora.scale) for lora in case.loras[1:] if lora is not None
    ]
    assert distance(ours, rest.formula(router)) < 1e-10


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "arrow", "general": ["expert_9"]}, ["router.general", "expert_9"]),
        ({"kind": "arrow", "top_k": 1, "general": ["expert_1"]}, ["router.general", "ranks 1, 3, 4, 5, 8"]),
        ({"kind": "ties"}, ["router.kind=ties", "one rank", "router.kind=merged"]),
        ({"kind": "dare"}, ["router.kind=dare", "one rank"]),
        ({"kind": "lag", "top_k": 3, "lag_candidates": 2}, ["router.top_k=3", "router.lag_candidates=2"]),
        ({"kind": "arrow", "top_k": 7, "general": ["expert_1"]}, ["router.top_k=7", "6 experts"]),
        ({"kind": "glider", "local": "svd"}, ["router.local='svd'", "arrow"]),
        ({"kind": "glider"}, ["gate", "router.kind=arrow"]),
        ({"kind": "average_activation"}, ["average_activation", "pool"]),
    ],
)
def test_what_a_router_cannot_do_is_refused_and_the_old_one_stays(settings, words):
    case = Case()
    model = case.attached(gd.RouterConfig(kind="arrow"))
    before = model(case.x, attention_mask=MASK)
    with pytest.raises(gd.GliderError) as refused:
        gd.set_router(model, gd.RouterConfig(**settings))
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert torch.equal(model(case.x, attention_mask=MASK), before)
