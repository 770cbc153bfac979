"""Gate scores against their formula, ``LN(u) · LN(v_e) / sqrt(d)``, by torch's own LayerNorm in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from glider_dist.routing.local import Inputs, arrow_scores, gate_prototypes, gate_scores

Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def formula(x_Td: torch.Tensor, gates_Ed: torch.Tensor) -> torch.Tensor:
    width = x_Td.shape[1]
    left, right = (F.layer_norm(each, (width,), eps=1e-5) for each in (x_Td, gates_Ed))
    return left @ right.t() / width**0.5


def ours(x_Td: torch.Tensor, gates_Ed: torch.Tensor) -> torch.Tensor:
    return gate_scores(Inputs.of(x_Td), gate_prototypes(gates_Ed))


def with_gradients(way: object, x_Td: torch.Tensor, gates_Ed: torch.Tensor, dtype: torch.dtype) -> Found:
    assert callable(way)
    x, gates = (each.to(dtype, copy=True).requires_grad_() for each in (x_Td, gates_Ed))
    scores = way(x, gates)
    (scores * torch.linspace(-1, 1, scores.numel(), dtype=dtype).view_as(scores)).sum().backward()
    assert x.grad is not None
    assert gates.grad is not None
    return scores.detach(), x.grad, gates.grad


@pytest.mark.parametrize("mean", [0.0, 1.0, 5.0])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_scores_and_gradients_equal_the_formula_wherever_the_rows_are_centred(dtype, limit, mean):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 96, generator=generator, dtype=torch.float64) + mean
    gates = torch.randn(7, 96, generator=generator, dtype=torch.float64)
    # Rounded to float32 first, so that both see the same numbers.
    x, gates = x.float().double(), gates.float().double()
    for made, wanted in zip(
        with_gradients(ours, x, gates, dtype), with_gradients(formula, x, gates, torch.float64), strict=True
    ):
        assert made.dtype == dtype
        assert float((made.double() - wanted).norm() / wanted.norm()) < limit


def test_a_row_of_one_value_has_scores_of_zero_and_finite_gradients():
    gates = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for value in (0.0, 3.0):
        scores, x_grad, gates_grad = with_gradients(ours, torch.full((2, 64), value), gates, torch.float32)
        assert float(scores.abs().max()) < 1e-3
        assert x_grad.isfinite().all()
        assert gates_grad.isfinite().all()


def test_no_token_has_no_score():
    assert ours(torch.zeros(0, 8), torch.randn(3, 8)).shape == (0, 3)


@pytest.mark.parametrize("way", ["gate", "arrow"])
def test_scores_are_as_exact_under_autocast(way: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gates = (torch.randn(rows, 96, generator=generator) for rows in (50, 7))

    def scores() -> torch.Tensor:
        return ours(x, gates) if way == "gate" else arrow_scores(x, gates, 0.5)

    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ gates.t()).dtype == torch.bfloat16
        assert torch.equal(scores(), scores().float())
        found = scores()
    assert torch.equal(found, scores())
