"""AdamW over many experts at once, each with its own step, rate, decay and clipping."""

from __future__ import annotations

import math

import pytest
import torch

from glider_dist.training.adamw import StackedAdamW, Update, row_norms


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("host", [False, True])
def test_each_expert_gets_what_torch_adamw_gives_it_alone(host):
    experts, width, steps = 5, 1000, 40
    weights = draw(experts, width)
    parameters = [weights[row].clone().requires_grad_() for row in range(experts)]
    decays, norms = [0.0, 0.1, 0.0, 0.3, 0.1], [0.0, 1.0, 30.0, 1e9, 5.0]
    reference = [torch.optim.AdamW([p], weight_decay=decays[row], eps=1e-8) for row, p in enumerate(parameters)]
    optimizer = StackedAdamW(weights, host)
    for step in range(steps):
        # Every expert sits out another share of the steps.
        rows = [row for row in range(experts) if step % (row + 2) or row == 0]
        grads = draw(experts, width, seed=step + 1) * 10.0 ** (step % 5 - 2)
        rates = [1e-2 / (1 + row) * min(1.0, (step + 1) / 7) for row in range(experts)]
        updates = {row: Update(rates[row], decays[row], norms[row]) for row in rows}
        for row in rows:
            parameters[row].grad = grads[row].clone()
            if norms[row]:
                torch.nn.utils.clip_grad_norm_([parameters[row]], norms[row])
            reference[row].param_groups[0]["lr"] = rates[row]
            reference[row].step()
        optimizer.step(weights, grads, updates, row_norms(grads, rows))
    for row, parameter in enumerate(parameters):
        error = (weights[row] - parameter.detach()).abs().max() / weights[row].abs().max()
        assert float(error) < 1e-12


def test_experts_without_an_update_keep_every_bit_of_weights_and_moments():
    weights, grads = draw(4, 300, dtype=torch.float32), draw(4, 300, seed=1, dtype=torch.float32)
    optimizer = StackedAdamW(weights)
    everyone = {row: Update(1e-2, 0.1, 1.0) for row in range(4)}
    optimizer.step(weights, grads, everyone, row_norms(grads, range(4)))
    kept = [tensor.clone() for tensor in (weights, optimizer.mean, optimizer.square, optimizer.steps)]
    grads[0], grads[2] = float("nan"), float("inf")
    some = {row: everyone[row] for row in (1, 3)}
    optimizer.step(weights, grads, some, row_norms(grads, [1, 3]))
    for before, after in zip(kept, (weights, optimizer.mean, optimizer.square, optimizer.steps), strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert not torch.equal(before[1], after[1])
        assert not torch.equal(before[3], after[3])


def test_norms_of_long_rows_are_accurate_and_show_what_is_not_finite():
    grads = draw(3, 3_000_000, dtype=torch.float32)
    exact = float(grads[0].double().norm())
    grads[1, 17], grads[2, 2_999_999] = float("inf"), float("nan")
    norms = row_norms(grads, [0, 1, 2])
    assert norms[0] == pytest.approx(exact, rel=1e-6)
    assert not math.isfinite(norms[1])
    assert math.isnan(norms[2])


def test_the_state_of_an_expert_is_two_moments_in_its_own_dtype():
    assert StackedAdamW(torch.zeros(3, 100)).bytes_per_expert == 800
