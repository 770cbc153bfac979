"""The routed layer against the plain formula (routed_cases.py): outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from routed_cases import CHOICES, compare_gradients, dense, error, make_case, served, token_scores, tolerance
from routed_models import ALPHAS

import glider_dist as gd
from glider_dist.model.attach import context_of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("way", "width"), [("sorted", (16, 24)), ("sorted", (10, 7)), ("every", (16, 24))], indirect=["way"]
)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["glider", "phatgoose", "global", "arrow"])
def test_outputs_and_gradients_equal_the_dense_formula(kind, choice, way, width, dtype):
    case = make_case(width, dtype=dtype)
    router = gd.RouterConfig(kind=kind, temperature=0.7, **ALPHAS, **CHOICES[choice])
    expected = dense(case, lambda query, u: served(token_scores(case, router, query, u), router))
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * pull).sum().backward()

    model, bank = case.attached(dtype)
    gd.set_router(model, router)
    x = case.x.detach().to(dtype).requires_grad_()
    similarity = case.similarity.detach().to(dtype).requires_grad_()
    with gd.query_scores(model, similarity):
        ours = model(x, attention_mask=case.mask)
    assert error(ours, expected) < tolerance(dtype)
    assert ours.dtype == dtype
    (ours * pull.to(dtype)).sum().backward()
    limit = tolerance(dtype) if dtype == torch.float64 else 1e-4
    compare_gradients(case, bank, {"x": x, "similarity": similarity}, limit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [(16, 24), (10, 7)])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["glider", "arrow"])
@pytest.mark.parametrize("way", ["each"], indirect=True)
def test_rows_that_read_their_own_experts_give_the_dense_formula(kind, choice, width, dtype, way):
    case = make_case(width, dtype=dtype)
    router = gd.RouterConfig(kind=kind, temperature=0.7, **ALPHAS, **CHOICES[choice])
    model, _ = case.attached(dtype)
    gd.set_router(model, router)
    with torch.no_grad(), gd.query_scores(model, case.similarity.detach().to(dtype)):
        ours = model(case.x.detach().to(dtype), attention_mask=case.mask)
    with torch.no_grad():
        expected = dense(case, lambda query, u: served(token_scores(case, router, query, u), router))
    assert error(ours, expected) < tolerance(dtype)
    assert ours.dtype == dtype


@pytest.mark.parametrize("kind", ["glider", "phatgoose", "arrow"])
def test_bfloat16_stays_close_to_the_formula_in_float64(kind, way):
    case = make_case(dtype=torch.bfloat16)
    router = gd.RouterConfig(kind=kind, top_k=2, **ALPHAS)
    expected = dense(case, lambda query, u: served(token_scores(case, router, query, u), router))
    model, _ = case.attached(torch.bfloat16)
    gd.set_router(model, router)
    with gd.query_scores(model, case.similarity.detach().bfloat16()):
        ours = model(case.x.detach().bfloat16(), attention_mask=case.mask)
    assert ours.dtype == torch.bfloat16
    assert error(ours, expected) < tolerance(torch.bfloat16)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("ranks", [(4,), (1, 4, 0, 8)], ids=["one", "several"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_gate_training_equals_the_formula_with_raw_gates(ranks, gated, dtype, way):
    case = make_case(ranks=ranks, dtype=dtype)
    owner = torch.tensor([3, 0, 1]) % len(ranks)

    def weights(query: int, u: torch.Tensor) -> dict[int, torch.Tensor]:
        e = int(owner[query])
        return {e: (case.gates[e] @ u).sigmoid() if gated else torch.ones((), dtype=torch.float64)}

    expected = dense(case, weights)
    # An expert alone also serves padding, which no loss looks at.
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pull = pull * case.mask[..., None]
    (expected * pull).sum().backward()
    model, bank = case.attached(dtype)
    context = context_of(model)
    context.gated = gated
    gates = context.gates["layer"].requires_grad_()
    x = case.x.detach().to(dtype).requires_grad_()
    with gd.assign_experts(model, owner):
        ours = model(x, attention_mask=case.mask)
    real = case.mask.bool()
    assert error(ours[real], expected[real]) < tolerance(dtype)
    (ours * pull.to(dtype)).sum().backward()
    limit = tolerance(dtype) if dtype == torch.float64 else 1e-4
    compare_gradients(case, bank, {"x": x, "gates": gates}, limit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_merged_equals_the_mean_of_the_deltas(dtype):
    case = make_case(ranks=(1, 4, 0, 8, 3, 5, 2), mask=("111", "111"), dtype=dtype)
    equal = torch.tensor(1 / len(case.loras), dtype=torch.float64)
    expected = dense(case, lambda query, u: dict.fromkeys(range(len(case.loras)), equal))
    model, _ = case.attached(dtype)
    gd.set_router(model, gd.RouterConfig(kind="merged"))
    assert error(model(case.x.detach().to(dtype)), expected) < tolerance(dtype)


@pytest.mark.parametrize("kind", ["phatgoose", "glider", "arrow", "global", "merged"])
def test_a_pool_of_one_expert_equals_plain_lora(kind, way):
    case = make_case(ranks=(4,), mask=("111", "111"))
    one = torch.ones((), dtype=torch.float64)
    expected = dense(case, lambda query, u: {0: one})
    model, _ = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind=kind, top_k=1, **ALPHAS))
    with gd.query_scores(model, case.similarity.detach()):
        assert error(model(case.x.detach()), expected) < 1e-10


def test_prototypes_are_frozen_so_two_backward_passes_in_a_row_work():
    case = make_case()
    for kind in ("arrow", "phatgoose"):
        model, bank = case.attached(torch.float64)
        context_of(model).gates["layer"].requires_grad_()
        gd.set_router(model, gd.RouterConfig(kind=kind))
        model(case.x.detach(), attention_mask=case.mask).sum().backward()
        first = bank.A.grad.clone()
        bank.A.grad = None
        model(case.x.detach(), attention_mask=case.mask).sum().backward()
        assert torch.equal(bank.A.grad, first)


@pytest.mark.parametrize("kind", ["arrow", "phatgoose", "merged"])
def test_a_first_forward_in_inference_mode_does_not_forbid_gradients_later(kind):
    case = make_case()
    model, _ = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind=kind))
    with torch.inference_mode():
        before = model(case.x.detach(), attention_mask=case.mask).clone()
    x = case.x.detach().requires_grad_()
    y = model(x, attention_mask=case.mask)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(y.detach(), before)
