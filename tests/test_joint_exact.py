"""Joint training on several ranks ends in the weights, moments and norms of one process, whatever the stage.

DeepSpeed reduces no float64 gradients, so the 1e-10 of float64 is for everything else: batches, routers, dispatch,
loss and state with sums of our own in the engine's place. DeepSpeed's own digits are those of float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_joint import (
    Case,
    Found,
    first_gradients,
    gates_beside_uneven_experts,
    make_pool,
    reference,
    train_all,
)

from glider_dist.testing import LocalRanks
from glider_dist.training.joint_state import Tensors

pytestmark = pytest.mark.jobs
Ranks = Callable[[int], LocalRanks]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pool(tmp_path_factory.mktemp("joint") / "pool")


def worst(ranks: list[Found], wanted: Found) -> dict[str, float]:
    """Largest difference of weights and moments over each tensor's largest value, of losses and of norms."""
    errors = state_errors([found.state for found in ranks], wanted.state)
    for found in ranks:
        for kind, ours, theirs in (("losses", found.losses, wanted.losses), ("norms", found.norms, wanted.norms)):
            found_errors = [abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)]
            errors[kind] = max([errors.get(kind, 0.0), *found_errors])
    return errors


def state_errors(parts: list[dict[str, Tensors]], wanted: dict[str, Tensors]) -> dict[str, float]:
    """Largest difference of weights and moments over each tensor's largest value; together the ranks have all."""
    state: dict[str, Any] = {}
    for part in parts:
        for name, tensors in part.items():
            state.setdefault(name, []).append(tensors)
    assert state.keys() == wanted.keys()
    errors = {"weights": 0.0, "moments": 0.0}
    for name, copies in state.items():
        for tensors in copies:
            assert tensors.keys() == wanted[name].keys()
            for key, value in tensors.items():
                other = wanted[name][key]
                error = float((value - other).abs().max()) / max(float(other.abs().max()), 1e-30)
                kind = "moments" if "exp_avg" in key else "weights"
                errors[kind] = max(errors[kind], error)
    return errors


def check(local_ranks: Ranks, world: int, cases: list[Case], path: str, limit: float) -> None:
    results = local_ranks(world).run(train_all, cases, path)
    for index, case in enumerate(cases):
        errors = worst([each[index] for each in results], reference(case, path))
        print(case, errors)
        assert max(errors.values()) < limit, (case, errors)
        assert errors["weights"] < limit / 10 or case.dtype != "float32", (case, errors)


WAYS = ("all_to_all", "gather", "auto")


def test_in_float64_the_loop_on_two_ranks_equals_one_process_to_ten_digits(local_ranks: Ranks, path: str):
    cases = [Case(parts=2, dispatch=way, engine="plain", dtype="float64") for way in WAYS]
    cases += [
        Case(parts=1, engine="plain", dtype="float64", clip=0.5),
        Case(parts=2, engine="plain", dtype="float64", clip=0.5, decay=0.1, placement="balanced"),
        Case(parts=2, engine="plain", dtype="float64", train="gates", router="phatgoose"),
        Case(parts=2, engine="plain", dtype="float64", train="experts", router="global"),
        Case(parts=2, engine="plain", dtype="float64", chosen=("expert_1", "expert_4"), decay=0.1),
        Case(parts=2, engine="plain", dtype="float64", chosen=("expert_0",), checkpointing=True),
        Case(parts=2, engine="plain", dtype="float64", batch=1),
    ]
    check(local_ranks, 2, cases, path, 1e-10)


def test_on_two_ranks_every_stage_equals_one_process(local_ranks: Ranks, path: str):
    cases = [
        Case(stage, parts, way, clip=0.5 if stage or parts == 1 else 0.0)
        for stage, way in ((0, "all_to_all"), (1, "gather"), (2, "auto"), (3, "all_to_all"))
        for parts in (1, 2)
    ]
    check(local_ranks, 2, cases, path, 1e-3)


def test_on_two_ranks_a_part_of_the_experts_or_gates_trains(local_ranks: Ranks, path: str):
    cases = [
        Case(2, 2, train="gates", clip=0.5),
        Case(3, 2, train="experts", decay=0.1),
        Case(2, 2, chosen=("expert_1", "expert_4"), decay=0.1),
        Case(3, 2, chosen=("expert_0",), checkpointing=True),
        Case(1, 2, batch=1, router="phatgoose"),
    ]
    check(local_ranks, 2, cases, path, 1e-3)


ADDED = {"balance_loss": 0.1, "z_loss": 0.01, "expert_dropout": 0.3, "router_noise": 0.2}


def test_what_is_added_to_the_routers_is_the_same_whatever_the_world(local_ranks: Ranks, path: str):
    alone = Case(engine="plain", dtype="float64", joint=ADDED)
    (wanted,) = local_ranks(1).run(train_all, [alone], path)
    assert min(wanted[0].router_losses) > 0
    plain = reference(alone, path)
    assert max(abs(a / b - 1) for a, b in zip(wanted[0].losses, plain.losses, strict=True)) > 1e-3
    cases = [
        Case(parts=1, engine="plain", dtype="float64", joint=ADDED),
        Case(parts=2, engine="plain", dtype="float64", joint=ADDED, checkpointing=True),
    ]
    for index, results in enumerate(zip(*local_ranks(2).run(train_all, cases, path), strict=True)):
        errors = worst(list(results), wanted[0])
        assert max(errors.values()) < 1e-10, (cases[index], errors)
        assert results[0].router_losses == pytest.approx(wanted[0].router_losses, rel=1e-10)


def test_over_a_bf16_base_two_ranks_end_near_one_process(local_ranks: Ranks, path: str):
    cases = [Case(stage, 2, way, clip=0.5, base_dtype="bfloat16") for stage, way in ((2, "gather"), (3, "auto"))]
    for index, results in enumerate(zip(*local_ranks(2).run(train_all, cases, path), strict=True)):
        wanted = reference(cases[index], path)
        assert worst(list(results), wanted)["losses"] < 1e-2
        # AdamW follows the sign of a gradient that is all rounding, so single weights may go another way.
        whole = {name: tensors for found in results for name, tensors in found.state.items()}
        start = reference(replace(cases[index], steps=1), path)
        assert distance(whole, wanted.state) < 0.3 * distance(start.state, wanted.state)


def distance(a: dict[str, Tensors], b: dict[str, Tensors]) -> float:
    """Between all weights of all experts, in the 2-norm."""
    parts = [
        (value - b[name][key]).flatten()
        for name, tensors in a.items()
        for key, value in tensors.items()
        if "exp_avg" not in key
    ]
    return float(torch.cat(parts).norm())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "parts"), [(1, 1), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4)])
def test_every_split_of_every_world_equals_one_process(local_ranks: Ranks, path: str, world, parts, stage):
    ways = WAYS if parts > 1 else ("auto",)
    cases = [Case(stage, parts, way, clip=0.5 if stage or parts == 1 else 0.0) for way in ways]
    check(local_ranks, world, cases, path, 1e-3)


def test_in_the_first_step_of_every_stage_experts_without_tokens_have_no_gradient(local_ranks: Ranks, path: str):
    plain = Case(parts=2, batch=1, router="phatgoose", engine="plain")
    wanted = local_ranks(2).run(first_gradients, plain, path)
    for stage in range(4):
        found = local_ranks(2).run(first_gradients, replace(plain, engine="deepspeed", zero_stage=stage), path)
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours["tokens"], theirs["tokens"])
            torch.testing.assert_close(ours["norms"], theirs["norms"], rtol=1e-3, atol=1e-6)
            idle = ours["tokens"] == 0
            assert idle.any()
            assert not ours["norms"][idle].any()
            assert (ours["norms"][~idle] != 0).float().mean() > 0.8
            assert any(f"expert {name!r} got a gradient without" in ours["said"] for name in ours["names"])


def test_under_zero_3_ranks_of_more_and_of_fewer_experts_gather_the_same_gates(local_ranks: Ranks, tmp_path: Path):
    file = tmp_path / "ds.json"
    # So few that one rank's experts leave no room for what the other's do.
    file.write_text(json.dumps({"zero_optimization": {"stage3_max_live_parameters": 100}}))
    wanted = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 5
    assert local_ranks(2).run(gates_beside_uneven_experts, str(file)) == [wanted, wanted]
