"""The routed model against outputs of the GLIDER authors' own expert layer, through the public API."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from reference_data import reference
from routed_models import ALL_WAYS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import glider_dist as gd

FIXTURES = ("llama_tiny", "t5_tiny")


def load(name: str) -> tuple[Path, torch.nn.Module, dict, dict, dict]:
    folder = reference("fixtures") / name
    auto = AutoModelForSeq2SeqLM if name.startswith("t5") else AutoModelForCausalLM
    model = auto.from_pretrained(folder / "base", dtype=torch.float32).eval()
    meta = json.loads((folder / "meta.json").read_text())
    return (
        folder,
        model,
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "expected.safetensors"),
        meta,
    )


def make_pool(folder: Path, target: Path, only: int | None = None) -> gd.ExpertPool:
    pool = gd.ExpertPool.create(target, base=str(folder / "base"))
    for expert in sorted((folder / "experts").iterdir()):
        if only is None or expert.name == f"expert_{only}":
            pool.add(expert.name, adapter=expert, gate=expert / "gate.safetensors")
    return pool


def router_for(mode: str) -> gd.RouterConfig:
    if match := re.fullmatch(r"local_top(\d)", mode):
        return gd.RouterConfig(kind="phatgoose", top_k=int(match[1]))
    if match := re.fullmatch(r"local_topp([\d.]+)", mode):
        return gd.RouterConfig(kind="phatgoose", top_p=float(match[1]))
    if match := re.fullmatch(r"glider_alpha(\d+)_top(\d)", mode):
        alpha = float(match[1])
        return gd.RouterConfig(kind="glider", top_k=int(match[2]), alpha_in=alpha, alpha_out=alpha, threshold=0.5)
    if match := re.fullmatch(r"arrow_top(\d)", mode):
        return gd.RouterConfig(kind="arrow", top_k=int(match[1]), temperature=10.0)
    raise AssertionError(mode)


def forward(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    with torch.no_grad():
        return model(**{name: inputs[name] for name in names if name in inputs}).logits


def error(logits: torch.Tensor, expected: torch.Tensor, inputs: dict) -> float:
    if "decoder_input_ids" not in inputs:
        real = inputs["attention_mask"].bool()
        logits, expected = logits[real], expected[real]
    return ((logits - expected).norm() / expected.norm()).item()


@ALL_WAYS
@pytest.mark.parametrize("name", FIXTURES)
def test_every_routing_mode_matches_the_published_layer(name, way, tmp_path, capsys):
    folder, model, inputs, expected, meta = load(name)
    pool = make_pool(folder, tmp_path / "pool")
    base = forward(model, inputs)
    assert error(base, expected["base.logits"], inputs) < 1e-4
    modes = sorted({key.rsplit(".", 1)[0] for key in expected} - {"base"})
    routed = [mode for mode in modes if not mode.startswith("single")]
    assert len(routed) >= 6
    gd.attach_pool(model, pool, gd.RouterConfig(kind="phatgoose"))
    for mode in routed:
        gd.set_router(model, router_for(mode))
        gd.reset_routing_stats(model)
        with gd.query_scores(model, inputs["global_similarity"]):
            logits = forward(model, inputs)
        relative = error(logits, expected[f"{mode}.logits"], inputs)
        stats = gd.routing_stats(model)
        counts = torch.stack([stats[site] for site in meta["sites"]])
        moved = (counts - expected[f"{mode}.counts"]).abs().sum().item() / 2
        with capsys.disabled():
            print(f"  {name} {mode}: relative error {relative:.1e}, {moved:.0f} of {counts.sum()} rows differ")
        assert relative < 1e-4
        assert moved == 0
    gd.detach(model)
    assert torch.equal(forward(model, inputs), base)


@pytest.mark.parametrize("name", FIXTURES)
def test_one_expert_alone_matches_the_published_layer_and_peft(name, tmp_path):
    from peft import PeftModel

    folder, model, inputs, expected, meta = load(name)
    stored = [index for index in range(meta["num_experts"]) if f"single_expert{index}.logits" in expected]
    assert len(stored) >= 3
    for index in stored:
        pool = make_pool(folder, tmp_path / f"pool{index}", only=index)
        gd.attach_pool(model, pool, gd.RouterConfig(kind="arrow", top_k=1))
        ours = forward(model, inputs)
        assert error(ours, expected[f"single_expert{index}.logits"], inputs) < 1e-4
        gd.detach(model)
        fresh = load(name)[1]
        theirs = forward(PeftModel.from_pretrained(fresh, pool.expert(f"expert_{index}").folder), inputs)
        assert error(ours, theirs, inputs) < 1e-5


@pytest.mark.parametrize("name", FIXTURES)
def test_an_assigned_expert_equals_that_expert_alone_in_a_mixed_batch(name, tmp_path):
    folder, model, inputs, expected, meta = load(name)
    gd.attach_pool(model, make_pool(folder, tmp_path / "pool"), gd.RouterConfig(kind="oracle"))
    batch = inputs["input_ids"].shape[0]
    ids = torch.arange(batch) % meta["num_experts"]
    with gd.assign_experts(model, ids):
        logits = forward(model, inputs)
    compared = [
        (row, index) for row, index in enumerate(ids.tolist()) if f"single_expert{index}.logits" in expected
    ]
    assert compared
    for row, index in compared:
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        assert error(logits[row : row + 1], expected[f"single_expert{index}.logits"][row : row + 1], one) < 1e-4
