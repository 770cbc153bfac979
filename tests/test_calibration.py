"""Which α and threshold the calibration chooses from the losses of queries."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from glider_dist.config import RouterConfig
from glider_dist.evaluation.calibrate import best_cosine, choose

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


def test_the_threshold_is_not_between_two_ranges_that_fit():
    """Two far thresholds fit as well; what lies between them loses far more."""
    cosines = np.linspace(0.1, 0.9, 60)
    low, high = (cosines > 0.3) & (cosines < 0.5), (cosines > 0.5) & (cosines < 0.7)
    inside = np.where(low, 0.0, np.where(high, 1.0, 0.5))
    outside = np.where(low, 1.0, np.where(high, 0.0, 0.5))
    losses = np.stack([outside, inside])
    threshold = choose(losses, cosines, [3.0, 100.0])["threshold"]
    loss = np.where(cosines > threshold, inside, outside).mean()
    least = min(np.where(cosines > p, inside, outside).mean() for p in np.linspace(0, 1, 200))
    assert loss < least + 0.1


def test_an_expert_that_no_query_may_choose_does_not_describe_one():
    similarity = torch.tensor([[0.9, 0.2, 0.3], [0.9, 0.1, float("-inf")]])
    names = ("general", "a", "b")
    arrow = RouterConfig(local="arrow", general=["general"])
    assert best_cosine(similarity, names, arrow).tolist() == pytest.approx([0.3, 0.1])
    assert best_cosine(similarity[1:, [0, 2]], ("general", "b"), arrow).tolist() == [-1.0]
    # Gates take no notice of it, and neither does the router's own maximum.
    assert best_cosine(similarity, names, RouterConfig(general=["general"])).tolist() == pytest.approx([0.9, 0.9])


def test_the_choice_is_that_of_trying_every_threshold_on_every_query():
    draw = np.random.default_rng(0)
    for count in (1, 2, 7, 60):
        losses, cosines = draw.random((5, count)), draw.random(count).round(1)
        chosen = choose(losses, cosines, ALPHAS)
        inside, outside = (losses[ALPHAS.index(chosen[key])] for key in ("alpha_in", "alpha_out"))
        of_chosen = np.where(cosines > chosen["threshold"], inside, outside)
        assert chosen["loss"] == pytest.approx(of_chosen.mean())
        tried = np.array([np.where(cosines > p, inside, outside) for p in np.linspace(-0.05, 1.05, 12)])
        excess = of_chosen - tried[tried.mean(1).argmin()]
        assert excess.mean() <= excess.std() / np.sqrt(count) + 1e-12


def test_a_hundred_thousand_queries_need_no_square_of_their_number():
    draw = np.random.default_rng(0)
    losses, cosines = draw.random((6, 100_000)), draw.random(100_000)
    tracemalloc.start()
    chosen = choose(losses, cosines, [1.0, *ALPHAS])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100 * losses.nbytes
    assert chosen["alpha_in"] >= chosen["alpha_out"]
