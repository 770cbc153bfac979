"""Bootstrap intervals for scores that come in tasks.

Queries of one task resemble each other, so an interval over pooled queries would be too narrow. The
bootstrap here is hierarchical (Davison and Hinkley, 1997, section 3.8): draw tasks with replacement, then
queries within each drawn task, and take percentiles of the mean over tasks of the mean over queries. A
statement about further tasks needs several tasks: with fewer than about five the interval is too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from glider_dist.errors import GliderError


@dataclass(frozen=True)
class Interval:
    """A mean and its interval, in the unit of the scores; all NaN if there were no scores."""

    mean: float
    low: float
    high: float


def mean_interval(
    scores_by_task: Mapping[str, np.ndarray], samples: int, seed: int, level: float = 0.95
) -> Interval:
    """Mean over tasks of the mean over queries, with its bootstrap interval.

    Args:
        scores_by_task: task -> scores of its queries, float [queries]. Tasks without queries are left out.
            With a single task only its queries are resampled, and the interval speaks of that task alone.
        samples: bootstrap samples, at least 1.
        seed: the same seed and scores give the same interval, whatever the order of the tasks.
        level: share of the samples inside the interval, 0 to 1.
    """
    tasks = [np.asarray(scores_by_task[task], dtype=np.float64) for task in sorted(scores_by_task)]
    tasks = [scores for scores in tasks if scores.size]
    if not tasks:
        return Interval(float("nan"), float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(tasks), size=(samples, len(tasks)))
    means = np.empty(drawn.shape)
    for index, scores in enumerate(tasks):
        where = drawn == index
        picks = generator.integers(scores.size, size=(int(where.sum()), scores.size))
        means[where] = scores[picks].mean(axis=1)
    low, high = np.quantile(means.mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    mean = float(np.mean([scores.mean() for scores in tasks]))
    return Interval(mean, float(low), float(high))


def paired_difference(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], samples: int, seed: int
) -> Interval:
    """Mean of ``a - b`` with its 95 % interval, where entry i of a task is the same query in both.

    Pairing removes what the queries share (some are hard for every router), so this interval may exclude 0
    where the two separate intervals overlap. Arguments as in :func:`mean_interval`.

    Raises:
        GliderError: if the tasks or a task's number of queries differ.
    """
    if a.keys() != b.keys():
        raise GliderError(f"only one side of a paired difference has task {min(a.keys() ^ b.keys())!r}")
    for task in a:
        if len(a[task]) != len(b[task]):
            raise GliderError(
                f"task {task!r} has {len(a[task])} and {len(b[task])} queries; pairing needs the same queries"
            )
    return mean_interval({task: np.subtract(a[task], b[task]) for task in a}, samples, seed)
