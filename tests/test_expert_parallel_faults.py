"""What the ranks say when one of them holds something else, computes something wrong, dies or hangs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

import pytest
from rank_faults import (
    attach_differently,
    broken_file,
    differing_replica,
    gradients,
    leaves,
    leaves_in_backward,
    parity,
    rank_of,
)
from test_parity import FIXTURES, load, make_pool

import glider_dist as gd
from glider_dist.testing import LocalRanks, random_pool, tiny_causal

pytestmark = pytest.mark.distributed
Ranks = Callable[[int], LocalRanks]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_pool(tmp_path_factory.mktemp("faults") / "pool", tiny_causal()).path)


@pytest.mark.parametrize("dispatch", ["all_to_all", "gather"])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("name", FIXTURES)
def test_the_published_layer_is_matched_over_two_and_three_ranks(
    local_ranks: Ranks, name, parts, dispatch, tmp_path
):
    make_pool(load(name)[0], tmp_path / "pool")
    for found in local_ranks(parts).run(parity, str(tmp_path / "pool"), name, parts, dispatch):
        assert len(found) >= 6
        for mode, relative, moved in found:
            assert relative < 1e-4, mode
            assert moved == 0, mode


def test_a_rank_with_another_pool_is_named_on_every_rank(local_ranks: Ranks, path, tmp_path):
    other = str(random_pool(tmp_path / "other", tiny_causal(), seed=1).path)
    assert set(local_ranks(3).run(attach_differently, [path, path, path], None, 3)) == {""}
    for said in local_ranks(3).run(attach_differently, [path, path, other], None, 3):
        assert "rank 2 has another pool than rank 0" in said
        assert "\n" not in said


def test_a_rank_with_other_gates_is_named(local_ranks: Ranks, path, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(path, other)
    pool = gd.ExpertPool.open(other)
    source = random_pool(tmp_path / "source", tiny_causal(), seed=1).expert("expert_1").folder
    folder = pool.expert("expert_1").folder
    pool.remove("expert_1")
    pool.add(
        "expert_1", adapter=gd.ExpertPool.open(path).expert("expert_1").folder, gate=source / "gate.safetensors"
    )
    assert folder.exists()
    for said in local_ranks(2).run(attach_differently, [path, str(other)], None, 2):
        assert "rank 1 has another pool than rank 0" in said


def test_a_rank_with_another_placement_is_named(local_ranks: Ranks, path):
    owners = [[0, 0, 0, 1, 1], [0, 0, 1, 0, 1]]
    for said in local_ranks(2).run(attach_differently, [path] * 2, owners, 2):
        assert "rank 1 has another placement of experts than rank 0" in said


def test_a_damaged_expert_stops_every_rank_with_its_name(local_ranks: Ranks, path, tmp_path):
    shutil.copytree(path, tmp_path / "damaged")
    file = tmp_path / "damaged" / "experts" / "expert_4" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    started = time.monotonic()
    for said in local_ranks(2).run(broken_file, str(tmp_path / "damaged")):
        assert "expert_4" in said
    assert time.monotonic() - started < 60


def test_replicas_that_differ_are_named_with_expert_and_site(local_ranks: Ranks, path):
    found = local_ranks(4).run(differing_replica, path)
    assert {before for before, _ in found} == {""}
    for rank in (1, 3):
        assert (
            "expert 'expert_4' differs at model.layers.1.mlp.down_proj between rank 1 and rank 3" in found[rank][1]
        )
    assert found[0][1] == found[2][1] == ""


def test_gradients_agree_with_the_tokens_served_or_the_expert_is_named(local_ranks: Ranks, path):
    assert local_ranks(2).run(gradients, path, "") == ["", ""]
    site = "model.layers.0.self_attn.v_proj"
    lost = local_ranks(2).run(gradients, path, "lost")
    assert "expert 'expert_0' got no gradient from" in lost[0]
    assert f"at {site} on rank 0" in lost[0]
    # As many tokens as that may have had no loss to give them a gradient.
    assert local_ranks(2).run(gradients, path, "lost", 1000) == ["", ""]
    stray = local_ranks(2).run(gradients, path, "stray")
    assert f"expert 'expert_4' got a gradient without having served a token at {site} on rank 1" in stray[1]


def test_a_rank_that_dies_is_named_by_the_others_at_once():
    with LocalRanks(3, timeout_s=100) as ranks:
        started = time.monotonic()
        with pytest.raises(gd.GliderError) as failure:
            ranks.run(leaves, 1, "dies")
        said = str(failure.value)
        assert time.monotonic() - started < 90
        assert "rank 1: the process ended" in said
        for rank in (0, 2):
            assert (
                f"rank {rank}: the exchange 'counts' among ranks [0, 1, 2] broke off (no word from rank 1)" in said
            )


@pytest.mark.slow
def test_a_rank_that_dies_in_the_backward_is_named_too():
    with LocalRanks(2, timeout_s=100) as ranks:
        with pytest.raises(gd.GliderError) as failure:
            ranks.run(leaves_in_backward, 0)
        assert "rank 1: the exchange 'outputs_grad' among ranks [0, 1] broke off (no word from rank 0)" in str(
            failure.value
        )


def test_a_rank_that_hangs_is_named_within_the_time_out(monkeypatch):
    monkeypatch.setattr("glider_dist.parallel.local_ranks._AFTER_FAILURE_S", 3.0)
    with LocalRanks(2, timeout_s=5) as ranks:
        with pytest.raises(gd.GliderError) as failure:
            ranks.run(leaves, 1, "hangs")
        assert "rank 0: the exchange 'counts' among ranks [0, 1] broke off (no word from rank 1)" in str(
            failure.value
        )
        # New processes take the next function.
        assert len(ranks.run(rank_of)) == 2
