"""Which α and threshold the calibration chooses from the losses of queries."""

from __future__ import annotations

import numpy as np
import pytest

from glider_dist.evaluation.calibrate import choose

ALPHAS = [1.0, 3.0, 10.0, 30.0, 100.0]


def queries(
    present: list[float], removed: list[float], noise: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Losses ``[5, 2 N]`` around a mean for each α, and cosines that tell known queries from unknown ones."""
    draw = np.random.default_rng(seed)
    count = 48
    losses = np.concatenate(
        [np.repeat(np.array(mean)[:, None], count, axis=1) for mean in (present, removed)], axis=1
    )
    cosines = np.concatenate([draw.uniform(0.5, 0.8, count), draw.uniform(0.1, 0.4, count)])
    return losses + noise * draw.standard_normal(losses.shape), cosines


def test_values_that_clearly_lose_less_are_chosen_whatever_was_published():
    losses, cosines = queries([0.9, 0.8, 0.1, 0.5, 0.7], [0.3, 0.6, 0.7, 0.8, 0.9], noise=0.01)
    chosen = choose(losses, cosines, ALPHAS)
    assert (chosen["alpha_in"], chosen["alpha_out"]) == (10.0, 1.0)
    assert chosen["tied"] == [[10.0, 1.0]]
    assert chosen["loss"] == pytest.approx(0.2, abs=0.01)


def test_the_threshold_lies_in_the_middle_of_what_tells_known_queries_from_unknown_ones():
    losses, cosines = queries([0.9, 0.8, 0.1, 0.5, 0.7], [0.3, 0.6, 0.7, 0.8, 0.9], noise=0.01)
    known, unknown = np.sort(cosines[:48]), np.sort(cosines[48:])
    # The next candidates on either side put one query on the wrong side; that is within a standard error.
    assert known[0] - unknown[-1] > 0
    assert unknown[-2] < choose(losses, cosines, ALPHAS)["threshold"] < known[1]


@pytest.mark.parametrize("seed", range(10))
def test_where_the_queries_cannot_decide_the_published_values_are_taken_and_rounding_changes_nothing(seed):
    losses, cosines = queries([0.3, 0.2, 0.02, 0.001, 0.001], [0.8, 0.8, 0.8, 0.8, 0.85], noise=0.05, seed=seed)
    chosen = choose(losses, cosines, ALPHAS)
    rounding = 1e-4 * np.random.default_rng(seed + 100).standard_normal(losses.shape)
    again = choose(losses + rounding, cosines, ALPHAS)
    assert [chosen[key] for key in ("alpha_in", "alpha_out")] == [again[key] for key in ("alpha_in", "alpha_out")]
    least = min(
        np.where(cosines > 0.45, losses[i], losses[o]).mean() for i in range(5) for o in range(5) if i >= o
    )
    # What is given up for that is less than one standard error.
    assert chosen["loss"] - least < 0.05 * np.sqrt(2) / np.sqrt(96) * 1.2


def test_alpha_outside_never_exceeds_alpha_inside():
    losses, cosines = queries([0.1, 0.5, 0.6, 0.7, 0.8], [0.9, 0.8, 0.7, 0.6, 0.1], noise=0.0)
    chosen = choose(losses, cosines, ALPHAS)
    assert chosen["alpha_in"] >= chosen["alpha_out"]
