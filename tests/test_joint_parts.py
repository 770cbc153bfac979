"""The parts of joint training alone: batches, additions to routers, DeepSpeed's configuration, new versions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from glider_dist.config import Config, MeshConfig, TrainConfig
from glider_dist.errors import GliderError
from glider_dist.model.batch import Encoded
from glider_dist.model.tokens import Tokens
from glider_dist.pool import ExpertPool
from glider_dist.testing import random_pool, tiny_causal
from glider_dist.training.batches import Packing
from glider_dist.training.joint_batches import Mixture, Row, micro_batches, share
from glider_dist.training.joint_config import deepspeed_config, recipes_of
from glider_dist.training.joint_keep import is_gate
from glider_dist.training.joint_params import Rows
from glider_dist.training.joint_pool import STAGING, complete, move_into_place, staging_pool, write_version
from glider_dist.training.joint_routing import RouterExtras, shares_of
from glider_dist.training.joint_settings import JointConfig

FILES = Path(__file__).resolve().parents[1] / "launch_configs" / "deepspeed"


def rows(lengths: list[int]) -> list[Row]:
    return [Row(str(place), Encoded((5,) * (length - 1), (1,)), place) for place, length in enumerate(lengths)]


# Batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 3, 7, 16])
def test_ranks_share_a_batch_evenly_and_take_equally_many_forwards(ranks: int, count: int):
    batch = rows([(7 * place) % 13 + 2 for place in range(count)])
    parts = share(batch, ranks)
    assert sorted(row.place for part in parts for row in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    micros = micro_batches(batch, ranks, Packing(30, 30, 30, 4, rows=2))
    assert len({len(part) for part in micros}) == 1
    assert [sorted(row.place for micro in part for row in micro) for part in micros] == [
        sorted(row.place for row in part) for part in parts
    ]
    assert all(len(micro) <= 2 for part in micros for micro in part)


def test_a_training_that_goes_on_encodes_nothing_of_the_steps_that_are_done():
    encoded: list[int] = []
    mixture = object.__new__(Mixture)
    mixture.examples = [None] * 7  # type: ignore[list-item]
    mixture.row = lambda index, place: encoded.append(index) or (index, place)  # type: ignore
    whole = list(mixture.steps(3, batch_size=4, steps=6))
    encoded.clear()
    assert list(mixture.steps(3, batch_size=4, steps=6, done=4)) == whole[4:]
    assert len(encoded) == 2 * 4


# Trained and frozen rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [(), (1,), (0, 3), (0, 1, 2, 3)])
def test_trained_rows_replace_theirs_and_all_depend_on_the_parameter(trained: tuple[int, ...]):
    stack, which = torch.randn(4, 2, 3), Rows(trained, 4)
    value = which.pick(stack).add(1.0).requires_grad_()
    merged = which.merge(value, which.rest(stack))
    expected = stack.clone()
    expected[list(trained)] += 1.0
    assert torch.allclose(merged, expected)
    merged.sum().backward()
    assert value.grad is not None
    assert torch.equal(value.grad, torch.full_like(value, float(bool(trained))))


def test_a_rank_without_experts_has_a_row_that_nothing_reads():
    which = Rows((), 0)
    value = which.pick(torch.zeros(0, 2, 3)).requires_grad_()
    assert value.shape == (1, 2, 3)
    merged = which.merge(value, which.rest(torch.zeros(0, 2, 3)))
    assert merged.shape == (0, 2, 3)
    assert merged.requires_grad


# What is added to the routers ---------------------------------------------------------------------------------


def extras(**joint: float) -> RouterExtras:
    made = RouterExtras(JointConfig(**joint), seed=1, top_k=2, sites=1)  # type: ignore[arg-type]
    made.loads = {"site": torch.tensor([0.5, 0.25, 0.25, 0.0])}
    return made


def test_the_losses_are_those_of_the_papers_and_ignore_excluded_experts():
    scores = torch.randn(6, 4, dtype=torch.float64)
    scores[0, 1] = scores[2] = float("-inf")
    served = scores[[0, 1, 3, 4, 5]]
    tokens = Tokens(1, 6, None, torch.zeros(6, dtype=torch.int64))
    made = extras(balance_loss=0.1, z_loss=0.01)
    made.begin(3, rows([6]))
    made("site", tokens, scores)
    load = made.loads["site"].double()
    wanted = 0.1 * 4 * (served.softmax(1) * load).sum() + 0.01 * served.logsumexp(1).square().sum()
    found = made.loss(tokens=12)
    assert found is not None
    assert torch.allclose(found, wanted / 12)


def test_a_balanced_router_has_a_balance_loss_of_its_weight():
    made = extras(balance_loss=1.0)
    made.loads = {"site": torch.full((4,), 0.25)}
    made.begin(1, rows([5]))
    made("site", Tokens(1, 5, None, torch.zeros(5, dtype=torch.int64)), torch.randn(5, 4))
    assert float(made.loss(tokens=5) or 0) == pytest.approx(1.0)


def test_noise_and_dropout_belong_to_the_example_and_the_step():
    made = extras(router_noise=0.5, expert_dropout=0.5)
    scores, batch = torch.zeros(9, 4), rows([2, 3, 4])
    together = Tokens(3, 4, None, torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2]))
    made.begin(5, batch)
    noisy, dropped = made("site", together, scores), made.drop(torch.zeros(3, 4))
    assert noisy.std() == pytest.approx(0.5, rel=0.5)
    made.begin(5, batch[1:2])
    alone = made("site", Tokens(1, 3, None, torch.zeros(3, dtype=torch.int64)), scores[:3])
    assert torch.equal(alone, noisy[2:5])
    assert torch.equal(made.drop(torch.zeros(1, 4)), dropped[1:2])
    made.begin(6, batch)
    assert not torch.equal(made("site", together, scores), noisy)
    assert not torch.equal(made("other", together, scores), made("site", together, scores))


def test_dropout_leaves_top_k_experts_and_drops_as_many_as_asked():
    many = rows([2] * 400)
    for chance in (0.3, 0.95):
        made = extras(expert_dropout=chance)
        made.begin(1, many)
        left = (~made.drop(torch.zeros(400, 4)).isneginf()).sum(1)
        assert left.min() >= 2
        if chance == 0.3:
            assert left.double().mean() == pytest.approx(4 * 0.7, abs=0.25)


def test_nothing_is_added_without_gradients_or_unless_asked():
    scores, tokens = torch.randn(4, 4), Tokens(1, 4, None, torch.zeros(4, dtype=torch.int64))
    made = extras()
    assert not made.watches
    made.begin(1, rows([4]))
    assert made("site", tokens, scores) is scores
    assert made.drop(scores) is scores
    assert made.loss(4) is None
    noisy = extras(router_noise=1.0)
    noisy.begin(1, rows([4]))
    with torch.no_grad():
        assert noisy("site", tokens, scores) is scores


def test_shares_of_no_tokens_are_zero():
    assert shares_of({"a": torch.tensor([1, 3]), "b": torch.tensor([0, 0])})["a"].tolist() == [0.25, 0.75]
    assert shares_of({"b": torch.tensor([0, 0])})["b"].tolist() == [0.0, 0.0]


# DeepSpeed's configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_files_in_launch_configs_say_what_is_used_without_one(stage: int):
    plain = deepspeed_config(Config(zero_stage=stage), 2, 1e-3, 1000)
    joint = JointConfig(deepspeed=str(FILES / f"zero{stage}.json"))
    assert deepspeed_config(Config(zero_stage=stage, joint=joint), 2, 1e-3, 1000) == plain
    assert plain["zero_optimization"]["reduce_bucket_size"] == 1000
    assert "auto" not in json.dumps(plain)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage is 3", "the job says 2"]),
        ({"gradient_clipping": 5.0}, ["gradient_clipping is 5.0", "the job says 1.0"]),
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps is 4"]),
        ({"optimizer": {"params": {"lr": 1.0}}}, ["optimizer.params.lr is 1.0"]),
        ({"bf16": {"enabled": True}}, ["bf16 is on", "fp32"]),
        ({"zero_optimization": {"sub_group_size": "auto"}}, ["sub_group_size is auto", "write a number"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer.type is Adam"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler is set", "train.warmup_ratio", "joint.learning_rate"]),
    ],
)
def test_a_file_that_contradicts_the_job_is_refused(content, words, tmp_path: Path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(GliderError) as error:
        deepspeed_config(Config(zero_stage=2, joint=JointConfig(deepspeed=str(path))), 2, 1e-3, 1000)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


def test_a_file_may_add_settings_and_choose_buckets(tmp_path: Path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}))
    made = deepspeed_config(Config(zero_stage=2, joint=JointConfig(deepspeed=str(path))), 2, 1e-3, 1000)
    assert made["zero_optimization"]["reduce_bucket_size"] == 7
    assert made["zero_optimization"]["stage"] == 2
    assert made["wall_clock_breakdown"] is True


def test_ranks_of_different_experts_prefetch_nothing_and_no_file_makes_them(tmp_path: Path):
    path = tmp_path / "ds.json"
    joint = JointConfig(deepspeed=str(path))
    cfg = Config(zero_stage=3, joint=joint, mesh=MeshConfig(expert_parallel=2))
    for value in ("auto", 0):
        path.write_text(json.dumps({"zero_optimization": {"stage3_prefetch_bucket_size": value}}))
        made = deepspeed_config(cfg, 2, 1e-3, 1000)["zero_optimization"]
        assert made["stage3_prefetch_bucket_size"] == 0
    path.write_text(json.dumps({"zero_optimization": {"stage3_prefetch_bucket_size": 50}}))
    with pytest.raises(GliderError, match=f"{path}: zero_optimization.stage3_prefetch_bucket_size is 50"):
        deepspeed_config(cfg, 2, 1e-3, 1000)
    alone = deepspeed_config(Config(zero_stage=3, joint=joint), 2, 1e-3, 1000)
    assert alone["zero_optimization"]["stage3_prefetch_bucket_size"] == 50


def test_recipes_take_what_joint_leaves_open_from_train():
    train = TrainConfig(max_steps=7, batch_size=3, learning_rate=0.1, gate_learning_rate=0.2)
    found = recipes_of(Config(train=train))
    assert [(each.steps, each.batch_size) for each in found.values()] == [(7, 3)] * 2
    assert {kind: each.learning_rate for kind, each in found.items()} == {"experts": 0.1, "gates": 0.2}
    found = recipes_of(Config(train=train, joint=JointConfig(steps=9, batch_size=2, gate_learning_rate=0.5)))
    assert [(each.steps, each.batch_size) for each in found.values()] == [(9, 2)] * 2
    assert found["gates"].learning_rate == 0.5


# New versions of a pool's experts -----------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path: Path) -> ExpertPool:
    made = random_pool(tmp_path / "pool", tiny_causal(), experts=2)
    made.expert("expert_0").update_card(descriptions=["It repeats."], scores={"validation_loss": 2.0})
    return made


def doubled(pool: ExpertPool, name: str) -> dict[str, torch.Tensor]:
    expert = pool.expert(name)
    tensors = {}
    for site, lora in expert.weights().items():
        tensors |= {f"{site}.A": lora.A * 2, f"{site}.B": lora.B.t() * 2}
    return {**tensors, **{f"{site}.gate": gate * 2 for site, gate in expert.gate().items()}}


def test_a_new_version_keeps_the_card_and_says_what_it_was_made_from(pool: ExpertPool):
    before, gate = pool.expert("expert_0").weights(), pool.expert("expert_0").gate()
    files = pool.expert("expert_0").card()["files"]
    write_version(pool, "expert_0", doubled(pool, "expert_0"), {"steps": 5})
    assert pool.expert("expert_0").card()["files"] == files
    complete(pool, ["expert_0"])
    assert move_into_place(pool)
    expert = ExpertPool.open(pool.path).expert("expert_0")
    for site, lora in expert.weights().items():
        assert torch.equal(lora.A, before[site].A * 2)
        assert torch.equal(lora.B, before[site].B * 2)
        assert lora.scale == before[site].scale
        assert torch.equal(expert.gate()[site], gate[site] * 2)
    card = expert.card()
    assert card["descriptions"] == ["It repeats."]
    assert card["files"] != files
    assert card["joint"] == [{"steps": 5, "from": {"files": files, "scores": {"validation_loss": 2.0}}}]
    assert "scores" not in card
    assert sorted(os.listdir(pool.path / "experts")) == ["expert_0", "expert_1"]
    assert not (pool.path / STAGING).exists()


def test_only_gates_may_be_new(pool: ExpertPool):
    tensors = {key: value for key, value in doubled(pool, "expert_1").items() if key.endswith(".gate")}
    before = pool.expert("expert_1").card()["files"]
    write_version(pool, "expert_1", tensors, {})
    complete(pool, ["expert_1"])
    move_into_place(pool)
    after = ExpertPool.open(pool.path).expert("expert_1").card()["files"]
    assert {name for name in after if after[name] != before[name]} == {"gate.safetensors"}


def test_incomplete_versions_are_dropped_and_the_old_ones_stay(pool: ExpertPool):
    before = {name: pool.expert(name).card()["files"] for name in pool.names}
    write_version(pool, "expert_0", doubled(pool, "expert_0"), {})
    with pytest.raises(GliderError, match="expert_1"):
        complete(pool, ["expert_0", "expert_1"])
    assert not move_into_place(pool)
    assert {name: pool.expert(name).card()["files"] for name in pool.names} == before
    assert not (pool.path / STAGING).exists()


@pytest.mark.parametrize("killed", ["before the first", "between its two renames", "after the first"])
def test_a_job_killed_while_it_moves_complete_versions_is_finished_by_the_next(pool: ExpertPool, killed: str):
    for name in pool.names:
        write_version(pool, name, doubled(pool, name), {})
    complete(pool, list(pool.names))
    experts, staged = pool.path / "experts", staging_pool(pool).path / "experts"
    if killed != "before the first":
        os.rename(experts / "expert_0", experts / ".expert_0.123.old")
    if killed == "after the first":
        os.rename(staged / "expert_0", experts / "expert_0")
    assert move_into_place(pool)
    found = ExpertPool.open(pool.path)
    assert found.names == ("expert_0", "expert_1")
    assert all(found.expert(name).card()["joint"] for name in found.names)
    assert sorted(os.listdir(experts)) == ["expert_0", "expert_1"]


def test_a_gate_projection_is_no_gate():
    wanted = [f"layers.0.mlp.gate_proj.gate{moment}" for moment in ("", ".exp_avg", ".exp_avg_sq")]
    other = [
        f"layers.0.mlp.gate_proj.{part}{moment}" for part in "AB" for moment in ("", ".exp_avg", ".exp_avg_sq")
    ]
    assert [key for key in (*wanted, *other, "best/layers.0.mlp.gate_proj.gate") if is_gate(key)] == wanted
