"""Parts of co-training by themselves: what shares a forward, replicas, failures, waves and restarts."""

from __future__ import annotations

import dataclasses
from typing import Any

import cotraining_worker as worker
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_checkpoints import Patient

from glider_dist.lora.bank import initial_site
from glider_dist.model.batch import Encoded
from glider_dist.model.engine import FrozenBase
from glider_dist.parallel.ranks import ALONE
from glider_dist.parallel.replicas import Replicas
from glider_dist.seed import seed_of
from glider_dist.testing import tiny_seq2seq
from glider_dist.training.batches import Packing, cuts, micro_batches
from glider_dist.training.checkpoint import Checkpoints
from glider_dist.training.cotrain import CoTraining
from glider_dist.training.order import replicas_for, step_indices
from glider_dist.training.unfinished import Interval, Unfinished, facts_of

# What shares a forward --------------------------------------------------------------------------------------


def rows_of(*lengths: int) -> list[Encoded]:
    return [Encoded(tuple(range(length - 1)), (1,)) for length in lengths]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(2, 50), min_size=1, max_size=12), min_size=1, max_size=8),
    st.integers(20, 300),
    st.integers(0, 60),
    st.none() | st.integers(1, 5),
)
def test_every_row_is_in_one_forward_that_fits_and_names_its_slots(lengths, tokens, overhead, rows):
    packing = Packing(tokens, tokens // 2, tokens, overhead, 5, rows)
    chosen = {3 * slot: rows_of(*own) for slot, own in enumerate(lengths)}
    found = micro_batches(chosen, packing)
    placed = sorted(
        (slot, len(item)) for micro in found for slot, item in zip(micro.slots, micro.items, strict=True)
    )
    assert placed == sorted((slot, len(item)) for slot, items in chosen.items() for item in items)
    for micro in found:
        assert len(micro.items) == 1 or len(micro.items) * max(map(len, micro.items)) <= tokens
        assert rows is None or len(micro.items) <= rows
        assert micro.lo == min(micro.slots)
        assert micro.hi == max(micro.slots) + 1


def test_an_expert_with_enough_rows_is_cut_as_if_alone_and_small_ones_share():
    packing = Packing(tokens=100, enough=60, mixed=60, overhead=4)
    chosen = {0: rows_of(5, 7), 1: rows_of(6, 6), 2: rows_of(30, 20, 40), 3: rows_of(8)}
    found = micro_batches(chosen, packing)
    assert [micro.items for micro in found if set(micro.slots) == {2}] == [
        micro.items for micro in micro_batches({2: chosen[2]}, packing)
    ]
    assert [sorted(set(micro.slots)) for micro in found if len(set(micro.slots)) > 1] == [[0, 1]]
    assert all(len(set(micro.slots)) == 1 for micro in micro_batches(chosen, packing, apart=chosen))


def test_rows_are_cut_where_padding_costs_more_than_a_forward():
    lengths = [4, 4, 4, 4, 50, 50]
    packing = Packing(1000, 10, 10, 0)
    assert cuts(lengths, packing, overhead=20) == [(0, 4), (4, 6)]
    assert cuts(lengths, packing, overhead=1000) == [(0, 6)]


def test_another_version_draws_the_same_experts_and_the_same_order():
    site = "model.layers.0.self_attn.q_proj"
    assert seed_of(0, "copy", "order") == 3876723765450516452
    assert seed_of(7, "copy", site) == 2979743300570907451
    assert list(step_indices(3, "copy", 7, 3, 5)) == [[2, 5, 6], [1, 0, 4], [3, 4, 0], [5, 6, 3], [1, 2, 4]]
    (a_rd,) = initial_site(["copy"], site, (3, 2), 2, 4.0, 7).A.tolist()
    assert a_rd == [
        pytest.approx([-0.001467475900426507, -0.012292487546801567]),
        pytest.approx([0.010561630129814148, 0.016573185101151466]),
    ]


# Failures, waves and restarts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "world", "rows", "count"),
    [
        ([1.0] * 8, 8, 16, 1),
        ([1.0] * 3, 2, 16, 1),  # one rank has a third more than the mean to do
        ([1.0] * 8, 64, 16, 8),
        ([1.0] * 8, 64, 4, 4),  # a fifth replica would have no row
        ([1.0] * 3, 8, 16, 2),
        ([100.0, *[1.0] * 10], 4, 16, 4),
        ([1.0], 6, 16, 6),
    ],
)
def test_so_many_ranks_train_each_expert_as_balance_the_work(costs, world, rows, count):
    assert replicas_for(costs, world, rows) == count


def test_replicas_divide_the_rows_of_a_step_among_them():
    rows = ["a" * length for length in (3, 9, 1, 7, 5, 2, 8)]
    for turn in range(4):
        parts = [Replicas(place=place, count=3).part(rows, turn) for place in range(3)]
        assert sorted(row for part in parts for row in part) == sorted(rows)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert Replicas().part(rows, 1) == rows


@pytest.fixture(scope="module")
def base() -> Any:
    torch.set_num_threads(1)
    return worker.base_model(torch.float32)


def few(name: str, steps: int = 12, **changes: Any) -> Any:
    made = worker.trainee(name)
    made.recipe = dataclasses.replace(made.recipe, steps=steps, eval_every=5, **changes)
    return type(made)(made.name, made.train, made.validate, made.recipe)


def run(base: Any, trainees: list[Any], slots: int, **options: Any) -> Any:
    return worker.train(FrozenBase(base, ALONE, 0), base, "expert", trainees, slots, **options)


@pytest.mark.parametrize(("dtype", "rate", "tolerance"), [("float64", 1e160, 1e-9), ("float32", 1e25, 1e-2)])
def test_an_expert_that_diverges_stops_alone_and_the_others_go_on_as_without_it(dtype, rate, tolerance):
    # In fp64 the groups are a loop, in fp32 one kernel with padded groups, where a NaN spreads to neighbours.
    model = worker.base_model(getattr(torch, dtype))
    names = list(worker.SIZES)
    wild = {"three": {"learning_rate": rate}}
    found = run(model, [few(name, **wild.get(name, {})) for name in names], slots=6)
    others = run(model, [few(name) for name in names if name not in wild], slots=5)
    lost = found.pop("three")
    assert "not finite in 5 steps in a row" in lost["stopped"]
    assert lost["skipped"] >= 5
    assert lost["row"].isfinite().all()
    for name, one in others.items():
        assert found[name]["skipped"] == 0
        assert found[name]["losses"] == pytest.approx(one["losses"], rel=tolerance)
        assert (found[name]["row"] - one["row"]).abs().max() <= tolerance * one["row"].abs().max()


def test_one_slot_at_a_time_gives_what_all_slots_give(base):
    # No two slots share a forward here, so the results have the same bits.
    lonely = Packing(tokens=500, enough=1, mixed=1, overhead=16)
    wave = run(base, [few(name) for name in worker.SIZES], slots=2, packing=lonely)
    all_at_once = run(base, [few(name) for name in worker.SIZES], slots=6, packing=lonely)
    assert wave.keys() == all_at_once.keys()
    for name, one in wave.items():
        assert torch.equal(one["row"], all_at_once[name]["row"])


def test_checkpointed_activations_change_rounding_only(base):
    plain = run(base, [few(name) for name in worker.SIZES], slots=6)
    again = run(base, [few(name) for name in worker.SIZES], slots=6, checkpointing=True)
    for name, one in plain.items():
        assert (again[name]["row"] - one["row"]).abs().max() <= 1e-4 * one["row"].abs().max()


def test_in_bf16_experts_trained_together_validate_as_those_trained_alone():
    model = worker.base_model(torch.bfloat16)
    found = run(model, [few(name, steps=20) for name in worker.SIZES], slots=6)
    for name, one in found.items():
        alone = run(model, [few(name, steps=20)], slots=1)[name]
        assert one["row"].dtype == torch.float32
        here, there = (dict(result["validation"])[result["best_step"]] for result in (one, alone))
        assert here == pytest.approx(there, rel=0.03)


def test_an_encoder_decoder_trains_experts_and_gates_together_as_alone():
    tiny = tiny_seq2seq().requires_grad_(False)
    model = dataclasses.replace(worker.base_model(torch.float32), model=tiny)
    for kind in worker.KINDS:
        frozen = FrozenBase(model, ALONE, 0)
        found = worker.train(frozen, model, kind, [few(name, steps=6) for name in worker.SIZES], 6)
        for name, one in found.items():
            alone = worker.train(frozen, model, kind, [few(name, steps=6)], 1)[name]
            assert one["losses"] == pytest.approx(alone["losses"], rel=1e-4)
            assert (one["row"] - alone["row"]).abs().max() <= 1e-2 * alone["row"].abs().max()


def test_an_early_stop_keeps_the_best_weights(base):
    found = run(base, [few("one", steps=60, patience=2, learning_rate=3e-2)], slots=1)["one"]
    steps = [step for step, _ in found["validation"]]
    assert len(found["losses"]) == steps[-1] < 60
    assert steps.index(found["best_step"]) == len(steps) - 3
    assert found["stopped"] == ""


def test_a_killed_training_goes_on_after_its_last_save_and_ends_the_same(base, tmp_path, monkeypatch):
    names = list(worker.SIZES)

    def keeper(steps: int) -> Unfinished:
        facts = {name: facts_of(few(name)) for name in names}
        return Patient(Checkpoints(tmp_path), facts, Interval(steps, 60.0))

    whole = run(base, [few(name) for name in names], slots=4)
    turns = 0
    once = CoTraining.turn

    def turn_until_killed(self: Any) -> Any:
        nonlocal turns
        turns += 1
        if turns == 8:
            raise KeyboardInterrupt
        return once(self)

    monkeypatch.setattr(CoTraining, "turn", turn_until_killed)
    with pytest.raises(KeyboardInterrupt):
        run(base, [few(name) for name in names], slots=4, unfinished=keeper(1))
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 4
    drawn = []
    monkeypatch.setattr(CoTraining, "turn", lambda self: drawn.append(len(self._active)) or once(self))
    again = run(base, [few(name) for name in names], slots=4, unfinished=keeper(60))
    assert sum(drawn) == 6 * 12 - 4 * 7
    assert again.keys() == whole.keys()
    for name, one in whole.items():
        assert torch.equal(one["row"], again[name]["row"])
        assert one["losses"] == again[name]["losses"]
        assert one["validation"] == [tuple(value) for value in again[name]["validation"]]
    assert list(tmp_path.iterdir()) == []
