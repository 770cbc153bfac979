"""The state of joint training knows no world: what one stage and split gathered, any other goes on from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rank_joint import Case, Half, make_pool, reference, train_part, train_past_the_range
from test_joint_exact import state_errors

from glider_dist.testing import LocalRanks
from glider_dist.training.joint_state import Tensors

pytestmark = pytest.mark.jobs
Ranks = Callable[[int], LocalRanks]
HALF = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pool(tmp_path_factory.mktemp("joint") / "pool")


def union(halves: list[Half], which: str = "state") -> dict[str, Tensors]:
    """All ranks' experts; where several have one, they must have the same bits."""
    found: dict[str, Tensors] = {}
    for half in halves:
        for name, tensors in getattr(half, which).items():
            for key, value in tensors.items():
                other = found.setdefault(name, {}).setdefault(key, value)
                assert torch.equal(value, other), (name, key)
    return found


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Case(2, 2), Case(3, 1)),
        (Case(3, 2, "gather", placement="balanced"), Case(1, 2)),
        (Case(0, 1, train="gates"), Case(2, 2, train="gates")),
        (Case(1, 1, chosen=("expert_1", "expert_3")), Case(3, 2, chosen=("expert_1", "expert_3"))),
        (Case(3, 1, train="experts"), Case(0, 2, train="experts")),
    ],
)
def test_another_stage_and_split_goes_on_where_one_stopped(local_ranks: Ranks, path: str, before, after):
    check(local_ranks, path, 2, before, 2, after)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "before", "other", "after"),
    [(3, Case(2, 3), 4, Case(3, 2)), (4, Case(3, 4), 1, Case(0, 1)), (1, Case(1, 1), 3, Case(3, 3))],
)
def test_another_world_goes_on_where_one_stopped(local_ranks: Ranks, path: str, world, before, other, after):
    check(local_ranks, path, world, before, other, after)


def check(local_ranks: Ranks, path: str, world: int, before: Case, other: int, after: Case) -> None:
    halves = local_ranks(world).run(train_part, before, path, 0, HALF, None)
    state = union(halves)
    assert {half.steps for half in halves} == {HALF}
    ends = local_ranks(other).run(train_part, after, path, HALF, before.steps, state)
    loaded = union(ends, "loaded")
    assert loaded.keys() == state.keys()
    for name, tensors in state.items():
        assert loaded[name].keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(loaded[name][key], value), (name, key)
    assert {end.steps for end in ends} == {before.steps}
    errors = state_errors([end.state for end in ends], reference(before, path).state)
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize(
    "case",
    [
        Case(0, 2),
        Case(2, 2, clip=1.0),
        *(pytest.param(case, marks=pytest.mark.slow) for case in (Case(0, 1, clip=1.0), Case(1, 2), Case(3, 2))),
    ],
)
def test_a_gradient_that_is_not_finite_ends_the_training_and_changes_nothing(
    local_ranks: Ranks, path: str, case: Case
):
    for message, same, step in local_ranks(2).run(train_past_the_range, case, path, 1):
        assert "the gradient is not finite in step 2; the pool is as it was" in message
        assert same
        assert step == 1


def test_in_the_first_step_a_gradient_that_is_not_finite_is_not_taken_for_another_experts(
    local_ranks: Ranks, path: str
):
    few = Case(2, 2, batch=1, router="phatgoose", clip=1.0)
    for message, same, step in local_ranks(2).run(train_past_the_range, few, path, 0):
        assert "the gradient is not finite in step 1; the pool is as it was" in message
        assert same
        assert step == 0
