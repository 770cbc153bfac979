"""A base or an adapter that does not fit is named, and the pool stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import ROUTED, SITE, Refused, says
from safetensors.torch import load_file, save_file
from small_jobs import HELD_IN, describe_and_index, snapshot

from glider_dist.errors import GliderError
from glider_dist.model.sites import fingerprint
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import CONFIG_FILE, GATE_FILE, WEIGHTS_FILE, write_adapter
from glider_dist.testing import random_pool, tiny_causal


@pytest.mark.parametrize("stage", ["train-experts", "train-gates", "calibrate", "evaluate", "predict"])
@pytest.mark.parametrize("other", ["shapes", "weights"])
def test_a_pool_made_for_another_base_is_refused(
    stage: str, other: str, refused: Refused, folder: Path, base: Path
) -> None:
    missing = stage.startswith("train")
    model = tiny_causal(hidden_size=32) if other == "shapes" else tiny_causal()
    names = HELD_IN[:2] if stage == "train-experts" else HELD_IN
    pool = random_pool(folder / "pool", model, experts=names, gates=not missing)
    describe_and_index(pool)
    if other == "weights":
        value = json.loads((pool.path / "pool.json").read_text())
        value["fingerprint"]["weights_sha256"] = "0" * 64
        (pool.path / "pool.json").write_text(json.dumps(value))
    difference = "site model.layers.0" if other == "shapes" else "weights 000000000000"
    says(refused(stage), pool.path, "another base", difference, f"leave base= out, or give base={pool.base}")


def test_a_base_that_is_not_there_and_no_network_are_one_sentence(
    refused: Refused, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(refused("train-experts", base="nobody/nothing"), "no network and no cached copy", "'nobody/nothing'")
    says(refused("train-experts", base=folder / "gone"), folder / "gone")
    says(refused("train-experts", base=folder / "tasks"), folder / "tasks", "config.json")


@pytest.mark.parametrize("stage", ["train-gates", "describe", "index", "calibrate", "evaluate", "predict"])
def test_a_folder_without_a_pool_is_refused(stage: str, refused: Refused, folder: Path) -> None:
    says(refused(stage), folder / "pool", "no pool.json")


@pytest.mark.parametrize("stage", ["index", "evaluate", "predict", "train-gates", "calibrate"])
def test_an_empty_pool_is_refused(stage: str, refused: Refused, folder: Path) -> None:
    ExpertPool.create(folder / "pool", "tiny", fingerprint(tiny_causal()))
    says(refused(stage, evaluate__routers="[base]", router__kind="base"), "pool")


def test_target_layers_that_the_model_lacks_are_refused(refused: Refused) -> None:
    says(refused("train-experts", "lora.targets=[q_proj,c_attn]"), "lora.targets", "'c_attn'", "down_proj")


def replace_adapter(pool: ExpertPool, name: str, site: str, d_in: int, d_out: int) -> None:
    """Put an adapter into the pool by hand, past the checks of ``add``."""
    folder = pool.path / "experts" / name
    write_adapter(folder, {site: (torch.ones(2, d_in), torch.ones(d_out, 2))}, 4.0, [site], "tiny", "CAUSAL_LM")
    save_file({site: torch.ones(d_in)}, folder / GATE_FILE)


@pytest.mark.parametrize("stage", ROUTED)
@pytest.mark.parametrize(
    ("site", "d_in", "needles"),
    [
        ("model.layers.7.self_attn.q_proj", 48, ["'upper'", "model.layers.7.self_attn.q_proj", "base"]),
        ("lm_head", 48, ["'upper'", "lm_head"]),
        (SITE, 40, ["'upper'", SITE, "(48, 40)", "(48, 48)"]),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused(
    stage: str, site: str, d_in: int, needles: list[str], refused: Refused, folder: Path
) -> None:
    pool = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN)
    replace_adapter(pool, "upper", site, d_in, 48)
    describe_and_index(pool)
    if stage == "train-gates":
        # The first expert's gate would be trained and written before the second one is looked at.
        for name in ("copy", "upper"):
            (pool.path / "experts" / name / GATE_FILE).unlink()
    says(refused(stage), *needles)


@pytest.mark.parametrize(
    ("site", "d_in", "needles"),
    [
        ("model.layers.7.self_attn.q_proj", 48, ["model.layers.7.self_attn.q_proj", "not a linear layer"]),
        (SITE, 40, [SITE, "(48, 40)", "(48, 48)"]),
    ],
)
def test_adding_an_adapter_that_does_not_fit_leaves_the_pool_as_it_was(
    site: str, d_in: int, needles: list[str], folder: Path
) -> None:
    pool = random_pool(folder / "pool", tiny_causal(), experts=["copy"])
    replace_adapter(pool, "adapter", site, d_in, 48)
    adapter = shutil.move(pool.path / "experts" / "adapter", folder / "adapter")
    before = snapshot(pool.path)
    with pytest.raises(GliderError) as error:
        pool.add("upper", adapter)
    says(str(error.value), "'upper'", *needles)
    assert snapshot(pool.path) == before


@pytest.mark.parametrize("name", ["copy", "../copy", "a/b", "a\\b", "", ".", "..", ".hidden", "-flag", "x" * 201])
def test_a_name_that_is_taken_or_not_allowed_is_refused_and_the_pool_left_as_it_was(
    name: str, folder: Path
) -> None:
    pool = random_pool(folder / "pool", tiny_causal(), experts=["copy"])
    before = snapshot(folder)
    with pytest.raises(GliderError) as error:
        pool.add(name, pool.path / "experts" / "copy")
    says(str(error.value), "already has" if name == "copy" else "not allowed", repr(name))
    assert snapshot(folder) == before


REFUSED_ADAPTERS = [
    ({"use_dora": True}, "DoRA"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "all"}, "biases"),
    ({"bias": "lora_only"}, "biases"),
    ({"lora_bias": True}, "biases"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"peft_type": None}, "peft_type"),
]


@pytest.mark.parametrize(("change", "needle"), REFUSED_ADAPTERS, ids=str)
def test_an_adapter_that_cannot_be_routed_is_refused_with_the_reason(
    change: dict[str, Any], needle: str, refused: Refused, folder: Path, pool: ExpertPool
) -> None:
    adapter = pool.path / "experts" / "upper"
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps({**config, **change}))
    before = snapshot(pool.path)
    with pytest.raises(GliderError) as error:
        pool.add("again", adapter)
    says(str(error.value), adapter / CONFIG_FILE, needle)
    assert snapshot(pool.path) == before
    says(refused("predict"), adapter / CONFIG_FILE, needle)


@pytest.mark.parametrize("stage", ["evaluate", "predict"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "gone", "half a pair", "another tensor"])
def test_a_broken_adapter_file_is_named(damage: str, stage: str, refused: Refused, pool: ExpertPool) -> None:
    path = pool.path / "experts" / "upper" / WEIGHTS_FILE
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage in ("text", "empty"):
        path.write_bytes(b"<html>not found</html>" if damage == "text" else b"")
    elif damage == "gone":
        path.unlink()
    else:
        tensors = load_file(path)
        key = next(iter(tensors))
        moved = tensors.pop(key)
        if damage == "another tensor":
            tensors["base_model.model.lm_head.weight"] = moved
        save_file(tensors, path)
    # A task without its expert is one mistake, a file that is damaged another.
    says(refused(stage), "'upper'" if damage == "gone" and stage == "evaluate" else path)


def test_training_a_gate_for_a_broken_adapter_is_refused_before_any_gate_is_trained(
    refused: Refused, folder: Path
) -> None:
    pool = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN, gates=False)
    path = pool.path / "experts" / "upper" / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    says(refused("train-gates"), path)


@pytest.mark.parametrize("damage", ["cut", "wrong length", "a site less"])
def test_a_broken_gate_is_named(damage: str, refused: Refused, pool: ExpertPool) -> None:
    path = pool.path / "experts" / "last" / GATE_FILE
    tensors = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:50])
    elif damage == "wrong length":
        save_file({**tensors, SITE: torch.ones(7)}, path)
    else:
        save_file({key: value for key, value in tensors.items() if key != SITE}, path)
    says(refused("predict"), path if damage == "cut" else f"'last' {'at' if 'wrong' in damage else 'lacks'}")
