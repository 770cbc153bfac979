"""The exchange itself, on real processes: every strategy against the dense formula, and what each one costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from rank_cases import Case, Outcome, run_cases, run_sequence

from glider_dist.testing import LocalRanks

pytestmark = pytest.mark.distributed
Ranks = Callable[[int], LocalRanks]

STRATEGIES = ("all_to_all", "gather", "auto")
WORKLOADS = (
    "uniform",
    "zipf",
    "one hot expert",
    "all tokens to one rank",
    "a rank without tokens",
    "a rank without load",
    "rotating hotspot",
    "one expert per query",
    "a single token",
    "empty",
)
SPLITS = [(2, 2), (3, 3), (4, 2), (4, 4)]
"""(world, expert parallel)."""


def check(cases: list[tuple[Case, str]], outcomes: list[list[list[Outcome]]], limit: float) -> None:
    for rank, found in enumerate(outcomes):
        for (case, strategy), exchanges in zip(cases, found, strict=True):
            for outcome in exchanges:
                assert outcome.error < limit, (rank, strategy, case, outcome.errors)


def product(frozen: bool) -> list[tuple[Case, str]]:
    """Every workload, placement, number of places and strategy."""
    ways = itertools.product(WORKLOADS, ("contiguous", "balanced"), (1, 2, 3), (False, True), STRATEGIES)
    return [
        (Case(load, places=places, ragged=ragged, placement=placement, seed=seed, frozen=frozen), strategy)
        for seed, (load, placement, places, ragged, strategy) in enumerate(ways)
    ]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("world", "parts"), SPLITS)
def test_every_strategy_gives_the_formula_and_its_gradients(local_ranks: Ranks, world, parts, frozen):
    # 7 is prime to the lengths of the lists: all pairs of their values occur.
    cases = product(frozen)[::7]
    check(cases, local_ranks(world).run(run_cases, cases, parts), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("world", "parts"), SPLITS)
def test_every_combination_gives_the_formula_and_its_gradients(local_ranks: Ranks, world, parts, frozen):
    cases = product(frozen)
    check(cases, local_ranks(world).run(run_cases, cases, parts), 1e-10)


@pytest.mark.parametrize(("world", "parts"), SPLITS)
def test_fewer_experts_than_ranks_or_one_alone_are_ordinary(local_ranks: Ranks, world, parts):
    cases = [
        (Case(workload, experts=experts, placement=placement, frozen=frozen, input_grad=input_grad), strategy)
        for workload in ("uniform", "a rank without tokens", "a single token", "empty")
        for experts in (1, 2, 3)
        for placement in ("contiguous", "balanced")
        for frozen, input_grad in ((True, True), (False, True), (False, False))
        for strategy in STRATEGIES
    ]
    check(cases, local_ranks(world).run(run_cases, cases, parts), 1e-10)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)]
)
@pytest.mark.parametrize(("world", "parts"), SPLITS)
def test_lower_precisions_are_as_exact_as_their_digits(local_ranks: Ranks, world, parts, dtype, limit):
    cases = [
        (Case(workload, experts=9, tokens=40, dtype=dtype, ragged=ragged, frozen=frozen), strategy)
        for workload in ("uniform", "zipf", "a rank without tokens", "one expert per query")
        for ragged in (False, True)
        for frozen in (False, True)
        for strategy in STRATEGIES
    ]
    check(cases, local_ranks(world).run(run_cases, cases, parts), limit)


@pytest.mark.parametrize("cache_bytes", [0, 5_000, 20_000, 1 << 30])
@pytest.mark.parametrize(("world", "parts"), SPLITS)
def test_experts_may_leave_the_cache_between_and_during_exchanges(local_ranks: Ranks, world, parts, cache_bytes):
    sequence = [Case(workload, experts=12, frozen=True, seed=seed) for seed, workload in enumerate(WORKLOADS * 2)]
    for strategy in ("gather", "auto"):
        for outcomes in local_ranks(world).run(run_sequence, sequence, strategy, parts, cache_bytes):
            for case, outcome in zip(sequence, outcomes, strict=True):
                assert outcome.error < 1e-10, (case, outcome.errors)
                assert outcome.cached <= cache_bytes
