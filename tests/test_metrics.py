"""Metrics of one answer and bootstrap intervals over many."""

from __future__ import annotations

import time

import numpy as np
import pytest
from rouge_score import rouge_scorer

from glider_dist.errors import GliderError
from glider_dist.evaluation.intervals import Interval, mean_interval, paired_difference
from glider_dist.evaluation.metrics import exact_match, normalise, rouge_l, score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Positive.\t", "positive"),
        ('"Paris"', "paris"),
        ("“Paris”!", "paris"),
        ('He said "no".', 'he said "no'),
        ("New\n  York", "new york"),
        ("03/04/2021.", "03/04/2021"),
        ("jane.doe@example.org", "jane.doe@example.org"),
        ("The a", "the a"),
        ("-5", "-5"),
        ("(A)", "(a)"),
        ("] )", "] )"),
        ("?", "?"),
        ("cafe\u0301", "caf\u00e9"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("", ""),
    ],
)
def test_normalise_drops_case_space_quotes_and_final_punctuation_only(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_exact_match_takes_the_best_target() -> None:
    assert exact_match("U.S.", ["America", "u.s."]) == 1.0
    assert exact_match("Mexico", ["America", "u.s."]) == 0.0


def test_exact_match_ignores_what_the_model_writes_after_its_first_line() -> None:
    assert exact_match("\n Paris\nInput: Berlin\nOutput:", ["Paris"]) == 1.0
    assert exact_match("London\nParis", ["Paris"]) == 0.0


def test_exact_match_compares_as_many_lines_as_the_target_has() -> None:
    assert exact_match("one\ntwo\nthree", ["one\ntwo"]) == 1.0
    assert exact_match("one\nthree\ntwo", ["one\ntwo"]) == 0.0


def test_an_empty_answer_is_wrong() -> None:
    assert exact_match("", ["yes"]) == 0.0
    assert exact_match("\n", ["yes"]) == 0.0
    assert rouge_l("", ["yes"]) == 0.0


def test_rouge_l_equals_the_reference_implementation_on_ascii_text() -> None:
    target = "The runners were running quickly through the old_town, 3.5 km a day."
    prediction = "the runner runs through the old town quickly -- 3.5 km daily"
    reference = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True).score(target, prediction)["rougeL"]
    assert 0 < reference.fmeasure < 1
    assert rouge_l(prediction, ["unrelated", target]) == pytest.approx(reference.fmeasure, abs=1e-12)


def test_rouge_l_counts_letters_of_every_script() -> None:
    assert rouge_l("Καλημέρα κόσμε", ["καλημέρα κόσμε"]) == 1.0
    assert rouge_l("le café", ["le cafard"]) == pytest.approx(0.5)


def test_score_picks_the_metric_and_names_the_known_ones_for_an_unknown_one() -> None:
    assert score("exact_match", "yes", ["Yes."]) == 1.0
    assert score("rouge_l", "big dog", ["dog"]) == pytest.approx(2 / 3)
    with pytest.raises(GliderError, match=r"'bleu' is unknown.*exact_match, rouge_l"):
        score("bleu", "yes", ["yes"])


@pytest.mark.parametrize("targets", [[], "yes"])
def test_targets_that_are_no_list_of_answers_are_refused(targets: list[str]) -> None:
    with pytest.raises(GliderError, match="non-empty list"):
        exact_match("yes", targets)


def test_the_mean_is_over_tasks_and_not_over_queries() -> None:
    interval = mean_interval({"large": np.ones(90), "small": np.zeros(10)}, samples=200, seed=0)
    assert interval.mean == 0.5
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_equal_scores_give_an_interval_of_no_width() -> None:
    scores = {"a": np.full(7, 0.5), "b": np.full(30, 0.5)}
    assert mean_interval(scores, samples=100, seed=0) == Interval(0.5, 0.5, 0.5)


def test_no_scores_give_nan() -> None:
    for scores in ({}, {"a": np.array([])}):
        interval = mean_interval(scores, samples=10, seed=0)
        assert np.isnan([interval.mean, interval.low, interval.high]).all()


def test_one_task_gives_the_interval_of_its_queries() -> None:
    scores = np.random.default_rng(1).normal(size=400)
    interval = mean_interval({"only": scores}, samples=4000, seed=0)
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    assert interval.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_variation_between_tasks_widens_the_interval() -> None:
    generator = np.random.default_rng(2)
    levels = generator.normal(size=40)
    scores = {f"task {index}": level + 0.1 * generator.normal(size=50) for index, level in enumerate(levels)}
    interval = mean_interval(scores, samples=4000, seed=0)
    means = np.array([values.mean() for values in scores.values()])
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * means.std() / np.sqrt(40), rel=0.1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        levels = 0.5 + 0.2 * generator.normal(size=20)
        scores = {str(task): level + 0.3 * generator.normal(size=20) for task, level in enumerate(levels)}
        interval = mean_interval(scores, samples=300, seed=trial)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_depends_on_the_seed_and_not_on_the_order_of_tasks() -> None:
    generator = np.random.default_rng(4)
    scores = {name: generator.random(20) for name in "abcd"}
    backwards = {name: scores[name] for name in "dcba"}
    first = mean_interval(scores, samples=100, seed=7)
    assert first == mean_interval(backwards, samples=100, seed=7)
    assert first != mean_interval(scores, samples=100, seed=8)


def test_a_wider_level_gives_a_wider_interval() -> None:
    scores = {name: np.random.default_rng(5).random(30) for name in "abc"}
    narrow = mean_interval(scores, samples=500, seed=0, level=0.5)
    wide = mean_interval(scores, samples=500, seed=0, level=0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_a_thousand_samples_of_twenty_tasks_take_less_than_a_second() -> None:
    scores = {str(task): np.random.default_rng(task).random(100) for task in range(20)}
    start = time.perf_counter()
    mean_interval(scores, samples=1000, seed=0)
    assert time.perf_counter() - start < 1.0


def test_the_paired_difference_is_the_difference_of_means_with_a_narrower_interval() -> None:
    generator = np.random.default_rng(6)
    a = {str(task): generator.random(40) for task in range(10)}
    b = {task: values - 0.05 + 0.01 * generator.normal(size=40) for task, values in a.items()}
    difference = paired_difference(a, b, samples=500, seed=0)
    alone = mean_interval(a, samples=500, seed=0)
    assert difference.mean == pytest.approx(alone.mean - mean_interval(b, samples=1, seed=0).mean)
    assert 0 < difference.low < 0.05 < difference.high
    assert difference.high - difference.low < 0.2 * (alone.high - alone.low)


def test_a_paired_difference_needs_the_same_tasks_and_lengths() -> None:
    with pytest.raises(GliderError, match="has task 'y'"):
        paired_difference({"x": np.ones(2)}, {"x": np.ones(2), "y": np.ones(2)}, samples=10, seed=0)
    with pytest.raises(GliderError, match="'x' has 2 and 3 queries"):
        paired_difference({"x": np.ones(2)}, {"x": np.ones(3)}, samples=10, seed=0)
