"""What we assume of DeepSpeed's internals, each checked alone: a new DeepSpeed that breaks one fails here, with a
sentence. (``training/deepspeed_moe.py`` states them.)"""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import pytest
from rank_deepspeed import compare, native_under_zero_3, unmarked

from glider_dist.testing import LocalRanks

pytestmark = pytest.mark.jobs
Ranks = Callable[[int], LocalRanks]
VERSION = f"DeepSpeed {deepspeed.__version__}"


def check(local_ranks: Ranks, world: int, stage: int, parts: int, clip: float, idle: bool) -> None:
    for rank, errors in enumerate(local_ranks(world).run(compare, stage, parts, clip, idle)):
        where = f"under ZeRO {stage}, {parts} expert parallel, on rank {rank} of {world}: {errors}"
        assert errors["norms"] < 1e-5, f"{VERSION} computes another gradient norm than one process {where}"
        assert errors["weights"] < 1e-5, (
            f"{VERSION} no longer sums an expert's gradients over its ranks and divides by all ranks {where}"
        )
        assert errors["moments"] < 1e-5, f"{VERSION} keeps AdamW's moments where they are not looked for {where}"


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_experts_and_gates_are_reduced_and_updated_as_in_one_process(local_ranks: Ranks, stage, parts):
    check(local_ranks, 2, stage, parts, 0.0 if (stage, parts) == (0, 2) else 1.0, idle=False)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_that_uses_no_expert_neither_hangs_nor_mixes_up_gradients(local_ranks: Ranks, stage):
    check(local_ranks, 2, stage, 1, 1.0, idle=True)


@pytest.mark.slow
@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_replicas_of_experts_on_four_ranks(local_ranks: Ranks, stage, idle):
    check(local_ranks, 4, stage, 2, 1.0 if stage else 0.0, idle)


def test_clipping_under_zero_0_is_still_wrong_for_experts(local_ranks: Ranks):
    errors = local_ranks(2).run(compare, 0, 2, 1.0, False)
    assert max(found["weights"] for found in errors) > 1e-4, (
        f"{VERSION} clips rightly under ZeRO 0 with expert parallelism now; "
        "let training/joint_config.py accept the combination"
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_experts_that_are_not_marked_are_overwritten_and_the_guard_says_so(local_ranks: Ranks, stage):
    first, second = local_ranks(2).run(unmarked, stage)
    assert first == ""
    assert "DeepSpeed has changed one on rank 1" in second, (
        f"{VERSION} keeps unmarked parameters that differ between ranks; the guard in deepspeed_moe is not needed"
    )


def test_zero_3_needs_a_marker_of_its_own(local_ranks: Ranks):
    for message in local_ranks(2).run(native_under_zero_3):
        assert "not supported with ZeRO Stage 3" in message, (
            f"{VERSION} takes MoE layers under ZeRO 3 now; deepspeed_moe may use one marker for all stages"
        )
