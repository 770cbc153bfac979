"""A base that reads images besides text: experts act on the tokens of its language model alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from routed_cases import ROWS, batch_of
from small_jobs import command, cores, settings, write_tasks
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import glider_dist as gd
from glider_dist.model.activations import average_activations
from glider_dist.model.sites import every_linear, fingerprint, linear_sites
from glider_dist.pool import ExpertPool
from glider_dist.testing import random_pool, save_tiny_base

IMAGE, PIXELS, PATCHES = 259, 28, 4
_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}


def tiny_gemma() -> Any:
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        "vocab_size": 264,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_key_value_heads": 2,
        "head_dim": 12,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "image_size": PIXELS, "patch_size": PIXELS // 2}
    config = Gemma3Config(
        text_config={**text, **layers, **_IDS, "initializer_range": 0.15},
        vision_config={**vision, **layers},
        mm_tokens_per_image=PATCHES,
        image_token_index=IMAGE,
        **_IDS,
    )
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).float().eval()


def with_images(count: int) -> dict[str, torch.Tensor]:
    """One row of three words and, before each of the last, an image."""
    ids = torch.tensor([[5, *[word for i in range(count) for word in (*[IMAGE] * PATCHES, 60 + i)]]])
    pixels = torch.randn(count, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1))
    of_image = (ids == IMAGE).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels} | {
        "token_type_ids": of_image
    }


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Any]:
    """An adapter as others train them, of the vision tower too, and the model that it was saved from."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_gemma(), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_experts_adapt_the_language_model_by_default_and_the_fingerprint_covers_all_layers() -> None:
    model = tiny_gemma()
    towers = set(every_linear(model)) - set(linear_sites(model))
    assert all(name.startswith("model.language_model.") for name in linear_sites(model))
    assert towers
    assert all(name.startswith("model.vision_tower.") for name in towers)
    assert set(fingerprint(model).sites) == set(every_linear(model))
    assert set(linear_sites(model, ["q_proj"])) < set(linear_sites(model))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_is_neither_served_nor_counted(left: bool, tmp_path: Path) -> None:
    model = tiny_gemma()
    gd.attach_pool(model, random_pool(tmp_path, model), gd.RouterConfig(kind="phatgoose"))
    inputs = batch_of(model, ROWS, left)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        together = model(**inputs).logits
        assert {int(counts.sum()) for counts in gd.routing_stats(model).values()} == {2 * int(real.sum())}
        for row, ids in enumerate(ROWS):
            alone = model(input_ids=torch.tensor([ids])).logits[0]
            assert torch.allclose(together[row, real[row]], alone, rtol=0, atol=2e-4 * float(alone.abs().max()))


@pytest.mark.parametrize("images", [1, 2])
def test_what_an_image_is_embedded_to_is_routed_like_words(images: int, tmp_path: Path) -> None:
    model, inputs = tiny_gemma(), with_images(images)
    pool = random_pool(tmp_path, model)
    gd.attach_pool(model, pool, gd.RouterConfig(kind="phatgoose"))
    with torch.no_grad():
        model(**inputs)
    counts = gd.routing_stats(model)
    assert set(counts) == set(linear_sites(gd.detach(model)))
    assert {int(each.sum()) for each in counts.values()} == {2 * inputs["input_ids"].numel()}


def test_an_adapter_of_the_vision_tower_too_is_served_where_tokens_pass(
    published: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, reference = published
    model = tiny_gemma()
    plain = model.get_submodule("model.vision_tower")
    pool = ExpertPool.create(tmp_path / "pool", base="gemma", fingerprint=fingerprint(model))
    pool.add("theirs", adapter=adapter)
    with caplog.at_level(logging.WARNING):
        gd.attach_pool(model, pool, gd.RouterConfig(kind="oracle"))
    assert " layers that the experts adapt lie outside the language model" in caplog.text
    inputs, pictures = batch_of(model, ROWS, left=True), with_images(2)
    with torch.no_grad(), gd.assign_experts(model, torch.tensor([0])):
        found, expected = (one(**inputs).logits for one in (model, reference))
        real = inputs["attention_mask"].bool()
        assert torch.allclose(found[real], expected[real], rtol=0, atol=1e-4 * float(expected.abs().max()))
        towers = [
            one(pictures["pixel_values"]).last_hidden_state for one in (plain, tiny_gemma().model.vision_tower)
        ]
        assert torch.equal(*towers)
        model(**pictures)
    means = average_activations(model, [inputs], 0)
    assert set(means) == set(linear_sites(gd.detach(model)))


def test_stages_train_and_serve_experts_over_it(tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks")
    base = save_tiny_base(tmp_path / "base", tiny_gemma())
    words = {"base": base, "train__max_steps": 2, "train__eval_every": 2, "train__gate_steps": 2}
    for stage in ("train-experts", "train-gates", "average-activations"):
        with cores(1):
            outcome = command(stage, *settings(tmp_path, **words))
        assert outcome.code == 0, outcome.err
    pool = ExpertPool.open(tmp_path / "pool")
    assert all(set(expert.shapes()) == set(linear_sites(tiny_gemma())) for expert in pool.experts())
    gd.attach_pool(tiny_gemma(), pool, gd.RouterConfig(kind="average_activation"))


def test_gates_are_trained_for_an_adapter_of_the_vision_tower_too(
    published: tuple[Path, Any], tmp_path: Path
) -> None:
    write_tasks(tmp_path / "tasks", held_in=("copy",), held_out=())
    base = save_tiny_base(tmp_path / "base", tiny_gemma())
    pool = ExpertPool.create(tmp_path / "pool", base=str(base), fingerprint=fingerprint(tiny_gemma()))
    pool.add("copy", adapter=published[0])
    with cores(1):
        outcome = command("train-gates", *settings(tmp_path, base=base, train__gate_steps=2))
    assert outcome.code == 0, outcome.err
    gate = pool.expert("copy").gate()
    assert set(gate) == set(pool.expert("copy").shapes())
    assert {site for site, vector in gate.items() if vector.any()} == set(linear_sites(tiny_gemma()))
