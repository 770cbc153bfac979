"""Experts over a base of 8 or 4 bits: they train, serve, and fit the plain base as well."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_checkpoints as work
import torch
from small_jobs import adapters, command, cores, describe_and_index, largest_difference, settings, write_tasks
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

import glider_dist as gd
from glider_dist.errors import GliderError
from glider_dist.model.base import load_base
from glider_dist.model.merge import export_model
from glider_dist.model.quantised import quantisation, quantised_bytes, weight_count
from glider_dist.pool import ExpertPool
from glider_dist.pool.files import read_json
from glider_dist.testing import LocalRanks, random_pool, save_tiny_base, tiny_causal

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose widths are multiples of 64."""
    folder = tmp_path_factory.mktemp("wide")
    save_tiny_base(folder, tiny_causal(hidden_size=64, intermediate_size=128))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tasks(tmp_path / "tasks")
    return tmp_path


@pytest.mark.parametrize("bits", [8, 4])
def test_the_linear_layers_shrink_and_give_nearly_what_they_gave(wide: Path, bits: int) -> None:
    plain, small = (load_base(str(wide), "float32", "cpu", some) for some in (None, bits))
    assert sum(p.nbytes for p in small.model.parameters()) < sum(p.nbytes for p in plain.model.parameters())
    # The scales of 4-bit blocks are no parameters.
    predicted = quantised_bytes(plain.model, bits)
    assert sum(p.nbytes for p in small.model.parameters()) == pytest.approx(predicted, rel=0.05)
    assert weight_count(small.model) == weight_count(plain.model)
    x = torch.randn(30, plain.model.config.hidden_size)
    expected, found = (one.model.model.layers[0].mlp.up_proj(x) for one in (plain, small))
    assert float((found - expected).norm() / expected.norm()) < (0.02 if bits == 8 else 0.15)
    assert f"{bits} bits" in small.reason


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_pass_after_a_forward_without_any(wide: Path, bits: int) -> None:
    model = load_base(str(wide), "float32", "cpu", bits).model
    hidden = torch.randn(1, 6, model.config.hidden_size)
    with torch.no_grad():
        before = model(inputs_embeds=hidden).logits
    hidden.requires_grad_()
    after = model(inputs_embeds=hidden).logits
    after.square().sum().backward()
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-3)
    assert hidden.grad is not None
    assert hidden.grad.abs().min() > 0


def test_four_bits_on_disk_are_as_guarded_on_a_cpu_as_those_asked_for(
    tmp_path: Path, wide: Path, base: Path
) -> None:
    small = load_base(str(quantised_on_disk(tmp_path / "wide", wide, 4)), "float32", "cpu").model
    layer = small.model.layers[0].mlp.up_proj
    assert vars(layer)["support_avx512bf16_for_cpu"] is False
    with pytest.raises(GliderError, match=r"multiples of 64, but .*q_proj reads 48; use base_bits=8, over a base"):
        load_base(str(quantised_on_disk(tmp_path / "narrow", base, 4)), "float32", "cpu")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_pool_trained_over_a_quantised_base_serves_over_both(folder: Path, wide: Path, bits: int) -> None:
    words: dict[str, Any] = {"base": wide, "train__max_steps": 30, "train__eval_every": 10}
    for stage in ("train-experts", "train-gates"):
        with cores(1):
            outcome = command(stage, *settings(folder, base_bits=bits, **words))
        assert outcome.code == 0, outcome.err
    pool = ExpertPool.open(folder / "pool")
    card = pool.expert("copy").card()
    losses = [loss for _, loss in card["training"]["validation"]]
    assert losses[-1] < losses[0]
    assert card["training"]["base_bits"] == bits
    describe_and_index(pool)
    keys: list[str] = []
    for changes in ({"base_bits": bits}, {}):
        with cores(1):
            ways = {**words, **changes, "evaluate__routers": "[phatgoose]"}
            outcome = command("evaluate", *settings(folder, **ways))
        assert outcome.code == 0, outcome.err
        assert read_json(folder / "run" / "results.json")
        keys.append(read_json(folder / "run" / "rows" / "phatgoose.json")["key"])
    # The second did not take the first one's answers for its own, although both have one run directory.
    assert keys[0] != keys[1]


def quantised_on_disk(folder: Path, base: Path, bits: int) -> Path:
    """As others publish them; loaded without ``base_bits``."""
    plain = load_base(str(base), "float32", "cpu")
    settings = quantisation(bits, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, device_map="cpu")
    model.save_pretrained(folder)
    plain.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.05), (4, 1e-4)])
def test_experts_are_merged_into_the_values_of_a_base_that_is_quantised_on_disk(
    tmp_path: Path, wide: Path, bits: int, limit: float
) -> None:
    packed = quantised_on_disk(tmp_path / "packed", wide, bits)
    pool = random_pool(tmp_path / "pool", tiny_causal(hidden_size=64, intermediate_size=128), base=str(packed))
    merged = AutoModelForCausalLM.from_pretrained(export_model(pool, tmp_path / "merged", (), "float32"))
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    small = load_base(str(packed), "float32", "cpu").model
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = small(ids).logits
        gd.attach_pool(small, pool, gd.RouterConfig(kind="merged"))
        expected, found = small(ids).logits, merged(ids).logits
    # In 8 bits the inputs of a layer are rounded as well.
    assert float((found - expected).norm() / expected.norm()) < limit
    assert float((before - expected).norm() / expected.norm()) > 0.3


def test_a_base_whose_quantisation_cannot_be_undone_is_not_merged_into(
    tmp_path: Path, wide: Path, monkeypatch
) -> None:
    packed = quantised_on_disk(tmp_path / "packed", wide, 8)
    pool = random_pool(tmp_path / "pool", tiny_causal(hidden_size=64, intermediate_size=128), base=str(packed))
    monkeypatch.setattr(Bnb8BitHfQuantizer, "_dequantize", HfQuantizer._dequantize)
    with pytest.raises(
        GliderError, match="quantised by bitsandbytes, which cannot be undone; pass base= the model"
    ):
        export_model(pool, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.jobs
@pytest.mark.slow
def test_two_ranks_train_over_a_quantised_base_as_one_does(
    folder: Path, wide: Path, local_ranks: Callable[[int], LocalRanks]
) -> None:
    words: dict[str, Any] = {"base": wide, "base_bits": 4, "train__max_steps": 10}
    assert local_ranks(2).run(work.stage, "train-experts", settings(folder, **words)) == ["done"] * 2
    alone = settings(folder, **{**words, "pool": folder / "alone", "run_dir": folder / "run2"})
    with cores(1):
        assert command("train-experts", *alone).code == 0
    assert largest_difference(adapters(folder / "pool"), adapters(folder / "alone")) <= 1e-3


def test_what_cannot_be_quantised_is_said(folder: Path, base: Path, monkeypatch) -> None:
    with pytest.raises(GliderError, match=r"multiples of 64, but .*q_proj reads 48; use base_bits=8"):
        load_base(str(base), "float32", "cpu", 4)
    outcome = command("train-experts", *settings(folder, base_bits=4, zero_stage=3))
    assert outcome.code == 2
    assert "base_bits and zero_stage=3 exclude each other" in outcome.errors[0]
    outcome = command("train-experts", *settings(folder, base_bits=5))
    assert outcome.code == 2
    assert "base_bits is 5, but must be 4 or 8" in outcome.errors[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GliderError, match="base_bits=8 needs the package bitsandbytes"):
        load_base(str(folder), "float32", "cpu", 8)
