"""The exchange itself, on real processes: every strategy against the dense formula, and what each one costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from host_waits import Waits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_cases import Case, Outcome, run_cases, run_sequence
from rank_costs import expected_traffic, run_like_gpu, run_twice

from glider_dist.lora.grouped import grouped_product
from glider_dist.parallel.cost import Costs
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


# 7 is prime to the lengths of the lists, so that all pairs of their values occur; each case is run under -m slow.
EVERY = pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])


@EVERY
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("world", "parts"), SPLITS)
def test_every_strategy_gives_the_formula_and_its_gradients(local_ranks: Ranks, world, parts, frozen, step):
    cases = product(frozen)[::step]
    check(cases, local_ranks(world).run(run_cases, cases, parts), 1e-10)


@EVERY
@pytest.mark.parametrize(("world", "parts"), SPLITS)
def test_fewer_experts_than_ranks_or_one_alone_are_ordinary(local_ranks: Ranks, world, parts, step):
    cases = [
        (Case(workload, experts=experts, placement=placement, frozen=frozen, input_grad=input_grad), strategy)
        for workload in ("uniform", "a rank without tokens", "a single token", "empty")
        for experts in (1, 2, 3)
        for placement in ("contiguous", "balanced")
        for frozen, input_grad in ((True, True), (False, True), (False, False))
        for strategy in STRATEGIES
    ][::step]
    check(cases, local_ranks(world).run(run_cases, cases, parts), 1e-10)


@EVERY
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)]
)
@pytest.mark.parametrize(("world", "parts"), SPLITS)
def test_lower_precisions_are_as_exact_as_their_digits(local_ranks: Ranks, world, parts, dtype, limit, step):
    cases = [
        (Case(workload, experts=9, tokens=40, dtype=dtype, ragged=ragged, frozen=frozen), strategy)
        for workload in ("uniform", "zipf", "a rank without tokens", "one expert per query")
        for ragged in (False, True)
        for frozen in (False, True)
        for strategy in STRATEGIES
    ][::step]
    check(cases, local_ranks(world).run(run_cases, cases, parts), limit)


@pytest.mark.parametrize("cache_bytes", [0, 20_000, 60_000])
@pytest.mark.parametrize(("world", "parts"), [(2, 2), (3, 3)])
def test_experts_may_leave_the_cache_between_and_during_exchanges(local_ranks: Ranks, world, parts, cache_bytes):
    sequence = [Case(workload, experts=12, frozen=True, seed=seed) for seed, workload in enumerate(WORKLOADS * 2)]
    for strategy in ("gather", "auto"):
        for outcomes in local_ranks(world).run(run_sequence, sequence, strategy, parts, cache_bytes):
            for case, outcome in zip(sequence, outcomes, strict=True):
                assert outcome.error < 1e-10, (case, outcome.errors)
                assert outcome.cached <= cache_bytes


@st.composite
def any_case(draw: st.DrawFn) -> tuple[Case, str]:
    d = draw(st.sampled_from([1, 3, 8, 17, 64]))
    site = st.tuples(st.sampled_from([1, 4, 8, 16]), st.just(d), st.sampled_from([1, 5, 16, 40]))
    case = Case(
        workload=draw(st.sampled_from(WORKLOADS)),
        experts=draw(st.integers(1, 40)),
        places=draw(st.integers(1, 8)),
        tokens=draw(st.integers(0, 70)),
        ragged=draw(st.booleans()),
        shapes=tuple(draw(st.lists(site, min_size=1, max_size=4))),
        seed=draw(st.integers(0, 1 << 20)),
        placement=draw(st.sampled_from(["contiguous", "balanced"])),
        frozen=draw(st.booleans()),
        input_grad=draw(st.booleans()),
    )
    return case, draw(st.sampled_from(STRATEGIES))


@pytest.mark.parametrize(("world", "parts"), SPLITS)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(cases=st.lists(any_case(), min_size=6, max_size=12))
def test_any_sizes_give_the_formula(local_ranks: Ranks, world, parts, cases):
    check(cases, local_ranks(world).run(run_cases, cases, parts), 1e-9)


COSTS = [
    Case(workload, places=places, ragged=ragged, shapes=shapes, dtype=dtype, frozen=frozen, experts=9)
    for workload, places in (
        ("uniform", 1),
        ("uniform", 3),
        ("zipf", 2),
        ("a rank without tokens", 2),
        ("empty", 2),
    )
    for ragged in (False, True)
    for shapes, dtype in (
        (((8, 24, 16), (16, 24, 40)), torch.float32),
        (((8, 24, 16),), torch.float64),
        (((4, 13, 7), (8, 13, 2), (1, 13, 3)), torch.bfloat16),
    )
    for frozen in (False, True)
]


@pytest.mark.parametrize("strategy", ["all_to_all", "gather"])
@pytest.mark.parametrize(("world", "parts"), SPLITS)
def test_an_exchange_costs_what_its_docstring_states(local_ranks: Ranks, world, parts, strategy):
    outcomes = local_ranks(world).run(run_cases, [(case, strategy) for case in COSTS], parts)
    for rank, found in enumerate(outcomes):
        for case, exchanges in zip(COSTS, found, strict=True):
            forward, backward = expected_traffic(case, strategy, parts, rank, world)
            assert exchanges[0].forward == forward, (rank, case)
            assert exchanges[0].backward == backward, (rank, case)
            assert sum(forward.collectives.values()) <= (3 if strategy == "all_to_all" else 2)
            assert sum(backward.collectives.values()) <= (2 if strategy == "all_to_all" else 1)
            assert (forward.host_syncs, backward.host_syncs) == (1, 0)


BY_BYTES = Costs(
    tokens_s=0.0, tokens_back_s=0.0, weights_s=0.0, weights_back_s=0.0, group_s=0.0, flops=1e15, copy=1e15
)


@pytest.mark.parametrize(("world", "parts"), SPLITS)
def test_auto_costs_what_it_chose_and_chooses_alike_on_all_ranks(local_ranks: Ranks, world, parts):
    sizes = [replace(case, tokens=tokens) for case in COSTS[::5] for tokens in (1, 400) if not case.frozen]
    outcomes = local_ranks(world).run(run_cases, [(case, "auto") for case in sizes], parts, BY_BYTES)
    chosen = set()
    for rank, found in enumerate(outcomes):
        for case, (outcome,), first in zip(sizes, found, outcomes[rank // parts * parts], strict=True):
            assert outcome.strategy == first[0].strategy
            chosen.add(outcome.strategy)
            forward, backward = expected_traffic(case, outcome.strategy, parts, rank, world)
            # The control row carries what either way needs.
            both, _ = expected_traffic(case, "gather", parts, rank, world)
            forward.sent["counts"] = both.sent["counts"]
            assert (outcome.forward, outcome.backward) == (forward, backward), (rank, case)
    assert chosen == {"all_to_all", "gather"}


def test_auto_counts_the_experts_in_use_whatever_the_number_of_tokens(local_ranks: Ranks):
    # Only groups cost anything: all_to_all makes rank 0 compute four of them, gather two on each rank.
    costs = replace(BY_BYTES, group_s=1.0, bandwidth=1e15)
    case = Case("two experts of one rank each", experts=16, tokens=60)
    frozen = replace(case, frozen=True)
    for first, both in local_ranks(2).run(run_cases, [(case, "auto"), (frozen, "auto")], 2, costs):
        assert [one.strategy for one in (*first, *both)] == ["gather"] * 3


def test_cached_experts_are_not_sent_again(local_ranks: Ranks):
    case = Case(experts=9, frozen=True, tokens=60)
    for outcomes in local_ranks(2).run(run_sequence, [case, case], "gather", 2):
        assert "experts" in outcomes[0].forward.collectives
        assert outcomes[1].forward.collectives == {"counts": 1}
        assert outcomes[1].forward.host_syncs == 1


@pytest.mark.parametrize("small", [False, True], ids=["rows", "all_experts"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_but_the_one_copy_of_an_exchange_waits_for_the_device(local_ranks: Ranks, strategy, small):
    for frozen, ragged, load in itertools.product(
        (False, True), (False, True), ("uniform", "a rank without tokens")
    ):
        case = Case(load, dtype=torch.float32, frozen=frozen, ragged=ragged)
        for seen, outcomes in local_ranks(2).run(run_like_gpu, case, strategy, 2, small):
            assert seen == {}, case
            assert all(outcome.forward.host_syncs == 1 for outcome in outcomes)
            assert all(outcome.error < 1e-5 for outcome in outcomes)


def test_a_wait_would_be_seen():
    with Waits() as waits:
        x = torch.arange(4)
        x[x > 1].tolist()
        x.nonzero()
        bool(x.sum())
        x.repeat_interleave(x)
        x.unique()
        x.float().cpu()
        x.masked_fill(x > 1, 0)
        x.repeat_interleave(x, output_size=6)
    assert {"tolist", "nonzero", "index of a mask", "__bool__", "repeat_interleave", "cpu"} <= set(waits.seen)
    assert waits.seen["repeat_interleave"] == 1
    assert any("unique" in name for name in waits.seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_of_aligned_rows_does_not_wait(dtype):
    x, w = torch.randn(10, 16, dtype=dtype), torch.randn(3, 16, 8, dtype=dtype, requires_grad=True)
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)
    with Waits() as waits:
        grouped_product(x, w, ends).square().sum().backward()
    assert waits.seen == {}
    with Waits() as waits:
        grouped_product(x[:, :5], w[:, :5], ends)
    assert waits.seen == {"tolist": 1}


@pytest.mark.parametrize(("world", "parts"), SPLITS)
def test_the_same_inputs_give_the_same_bits_in_deterministic_mode(local_ranks: Ranks, world, parts):
    cases = [
        (Case(workload, dtype=dtype, frozen=frozen, tokens=50, ragged=True), strategy)
        for workload in ("uniform", "zipf")
        for dtype in (torch.float32, torch.bfloat16)
        for frozen in (False, True)
        for strategy in STRATEGIES
    ]
    for same in local_ranks(world).run(run_twice, cases, parts):
        assert all(same)
