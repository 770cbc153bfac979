"""Whole models over a pool whose experts live on several ranks, against one process that has them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_generation import generate_all, shortlisted
from rank_models import (
    CAUSAL,
    MODELS,
    Found,
    Run,
    alternate,
    compare_all,
    evaluate_between_steps,
    train_after_inference,
)

from glider_dist.parallel.exchange import Traffic
from glider_dist.testing import LocalRanks, random_pool

pytestmark = pytest.mark.distributed
Ranks = Callable[[int], LocalRanks]


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Experts of different ranks, of which some adapt only some sites."""
    made: dict[str, Path] = {}
    ends = {
        "llama": (["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]),
        "qwen": (["q_proj", "k_proj", "v_proj", "o_proj"], ["down_proj"]),
        "opt": (["q_proj", "k_proj"], ["fc1", "fc2"]),
        "t5": (["q", "v"], ["wi_0", "wo"]),
        "bert": (["query", "value"], ["dense"]),
    }

    def find(name: str) -> str:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "pool"
            few, other = ends[name]
            random_pool(made[name], MODELS[name](), ranks=[1, 4, 8, 3, 9], sites=[None, few, None, other, None])
        return str(made[name])

    return find


def check(runs: list[Run], results: list[list[Found]], limit: float = 1e-9) -> None:
    for rank, each in enumerate(results):
        for run, found in zip(runs, each, strict=True):
            assert "logits" in found.errors
            assert max(found.errors.values()) < limit, (rank, run, found.errors)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_over_two_ranks_equals_one_with_all_experts(local_ranks: Ranks, pools, name):
    left = "left" if name in CAUSAL else "right"
    runs = [
        Run(name, "glider", "all_to_all"),
        Run(name, "topp", "gather", padding=left, placement="balanced"),
        Run(name, "phatgoose", "auto", empty=(0,)),
        Run(name, "global", "all_to_all", empty=(1,)),
        Run(name, "arrow", "gather", padding=left),
        Run(name, "glider arrow", "auto", train=False),
        Run(name, "oracle", "all_to_all"),
        Run(name, "oracle", "gather", train=False, gated=True),
        Run(name, "glider", "gather", train=False, cache_bytes=30_000, forwards=3),
        Run(name, "base", "auto", train=False, forwards=1),
    ]
    check(runs, local_ranks(2).run(compare_all, runs, pools(name)))


@pytest.mark.parametrize(("world", "parts"), [(3, 3), (4, 2)])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_three_ranks_or_two_copies_of_two_give_the_same(local_ranks: Ranks, pools, name, world, parts):
    runs = [
        Run(name, "topp", "all_to_all", parts, empty=(1,), placement="balanced"),
        Run(name, "glider", "gather", parts, empty=(0, 2)),
        Run(name, "arrow", "auto", parts, train=False),
    ]
    check(runs, local_ranks(world).run(compare_all, runs, pools(name)))


def test_one_expert_over_two_copies_of_two_ranks_leaves_one_of_each_without(local_ranks: Ranks, tmp_path):
    random_pool(tmp_path / "pool", MODELS["llama"](), experts=1)
    runs = [Run("llama", "global", dispatch, experts=1) for dispatch in ("all_to_all", "gather")]
    check(runs, local_ranks(4).run(compare_all, runs, str(tmp_path / "pool")))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_single_precision_agrees_to_its_digits(local_ranks: Ranks, pools, name):
    runs = [Run(name, "oracle", dispatch, dtype=torch.float32) for dispatch in ("all_to_all", "gather")]
    check(runs, local_ranks(2).run(compare_all, runs, pools(name)), 2e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_recomputed_activations_are_made_as_they_were(local_ranks: Ranks, pools, name):
    # In the first step the groups of sites are not known yet, and in frozen ones the cache fills meanwhile.
    runs = [
        Run(name, "glider", dispatch, checkpointing=True, train=train, forwards=3)
        for dispatch in ("all_to_all", "gather", "auto")
        for train in (True, False)
    ]
    check(runs, local_ranks(2).run(compare_all, runs, pools(name)))


def test_auto_may_change_its_mind_between_forwards_but_not_when_one_is_repeated(local_ranks: Ranks, pools):
    for train in (True, False):
        run = Run("llama", "glider", "auto", checkpointing=True, train=train, forwards=4, cache_bytes=20_000)
        found = local_ranks(2).run(alternate, run, pools("llama"))
        check([run], [[each] for each in found])
        assert all(min(each.chosen.values()) > 0 for each in found)


def test_ranks_that_each_hold_all_experts_exchange_nothing(local_ranks: Ranks, pools):
    runs = [Run("llama", "glider", "auto", parts=1)]
    results = local_ranks(2).run(compare_all, runs, pools("llama"))
    check(runs, results)
    assert all(traffic == Traffic() for found in results for traffic in found[0].traffic)


GROUPS = {
    "llama": 2 * 4,  # q k v | o | gate up | down
    "qwen": 2 * 4,
    "opt": 2 * 4,  # q k v | o | fc1 | fc2
    "t5": 2 * 4 + 2 * 7,  # and of the decoder besides: q | k v | o
    "bert": 2 * 4 + 2 * 7,
}


@pytest.mark.parametrize("name", MODELS)
def test_sites_that_read_the_same_input_share_one_exchange(local_ranks: Ranks, pools, name):
    runs = [Run(name, "glider", dispatch, train=False, forwards=3) for dispatch in ("all_to_all", "gather")]
    for each in local_ranks(2).run(compare_all, runs, pools(name)):
        for found in each:
            exchanges = [traffic.collectives["counts"] for traffic in found.traffic]
            assert exchanges == [found.sites, GROUPS[name], GROUPS[name]]
            assert len(found.groups) == GROUPS[name]
            assert {1, 3} <= {len(group) for group in found.groups.values()} <= {1, 2, 3}
            assert all(traffic.host_syncs == traffic.collectives["counts"] for traffic in found.traffic)


@pytest.mark.parametrize(("world", "parts"), [(2, 2), (3, 3), (4, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_generate_different_numbers_of_prompts_and_tokens(local_ranks: Ranks, pools, name, world, parts):
    if (name in ("qwen", "opt", "bert")) and world != 2:
        pytest.skip("two models are enough for the larger worlds")
    counts = [2, 0, 1, 3][:world]
    for dispatch, settings in (("all_to_all", {}), ("gather", {"num_beams": 2, "num_return_sequences": 2})):
        results = local_ranks(world).run(
            generate_all, name, pools(name), parts, counts, "glider", settings, dispatch
        )
        forwards = {result[4] for result in results}
        assert len(forwards) == 1
        for ours, alone, same, traffic, _ in results:
            assert ours == alone
            assert same  # what a rank does for the others is not counted
            assert traffic.collectives["counts"] > 0


def test_no_prompts_anywhere_end_at_once(local_ranks: Ranks, pools):
    for ours, _, _, _, forwards in local_ranks(2).run(
        generate_all, "llama", pools("llama"), 2, [0, 0], "glider", {}, "auto"
    ):
        assert ours == []
        assert forwards <= 1


def test_cached_decoding_exchanges_once_per_group_and_step(local_ranks: Ranks, pools):
    settings = {"max_new_tokens": 6, "min_new_tokens": 6}
    for name, step in (("llama", GROUPS["llama"]), ("t5", 2 * 6)):
        sites = {"llama": 2 * 7, "t5": 2 * 7 + 2 * 11}[name]
        results = local_ranks(2).run(generate_all, name, pools(name), 2, [2, 3], "glider", settings, "all_to_all")
        for _, _, _, traffic, forwards in results:
            assert forwards == 6
            assert traffic.collectives["counts"] == sites + 5 * step


@pytest.mark.parametrize(("dispatch", "router"), [("auto", "shortlist"), ("local", "listed arrow")])
@pytest.mark.parametrize(("name", "world", "parts"), [("llama", 2, 2), ("t5", 3, 3), ("qwen", 4, 2)])
def test_a_shortlist_is_fetched_once(local_ranks: Ranks, pools, name, world, parts, dispatch, router):
    for never in (False, True):
        results = local_ranks(world).run(shortlisted, name, router, pools(name), parts, dispatch, never)
        for error, costs, held in results:
            assert error < 1e-9
            assert held > 0 or never or dispatch == "local"
            entered, *forwards = costs
            assert entered.collectives == {"counts": 1, "experts": 1}
            assert entered.host_syncs == 1
            assert forwards == [Traffic(), Traffic()]


def test_a_shortlist_larger_than_the_cache_is_used_without_a_copy(local_ranks: Ranks, pools):
    results = local_ranks(2).run(shortlisted, "llama", "shortlist", pools("llama"), 2, "auto", False, 1000)
    for error, costs, held in results:
        assert error < 1e-9
        assert costs[0].collectives == {"counts": 1, "experts": 1}
        assert costs[1:] == [Traffic(), Traffic()]
        assert held == 0


def test_a_shortlist_serves_generation_without_waiting_for_each_other(local_ranks: Ranks, pools):
    results = local_ranks(2).run(generate_all, "llama", pools("llama"), 2, [3, 0], "shortlist", {}, "local")
    for ours, alone, same, traffic, _ in results:
        assert ours == alone
        assert same
        assert traffic.collectives.keys() <= {"counts", "experts"}
    assert results[1][4] == 0


def test_a_shortlist_does_not_bind_routers_that_ignore_it(local_ranks: Ranks, pools):
    runs = [Run("llama", router, "auto", train=False) for router in ("arrow shortlist", "base")]
    check(runs, local_ranks(2).run(compare_all, runs, pools("llama")))


def test_experts_that_train_are_fetched_anew_after_they_changed(local_ranks: Ranks, pools):
    for dispatch in ("gather", "auto"):
        for before, after in local_ranks(2).run(evaluate_between_steps, pools("llama"), dispatch):
            assert before < 1e-9
            assert after < 1e-9


def test_inference_mode_does_not_spoil_later_training(local_ranks: Ranks, pools):
    assert max(local_ranks(2).run(train_after_inference, pools("llama"))) < 1e-9


def test_the_memory_of_experts_falls_with_the_number_of_ranks(local_ranks: Ranks, tmp_path):
    random_pool(tmp_path / "pool", MODELS["llama"](), experts=12)
    held = {}
    for world, parts in ((2, 1), (2, 2), (3, 3), (4, 4)):
        runs = [Run("llama", "glider", "all_to_all", parts, train=False, forwards=1, experts=12)]
        results = local_ranks(world).run(compare_all, runs, str(tmp_path / "pool"))
        check(runs, results)
        (held[parts],) = {found[0].nbytes for found in results}
    assert held == {parts: held[1] // parts for parts in (1, 2, 3, 4)}
