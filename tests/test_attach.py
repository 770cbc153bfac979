"""What attaching a pool refuses, and what it warns of."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_jobs import describe_and_index
from torch import nn

import glider_dist as gd
from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.model.attach import context_of
from glider_dist.model.sites import fingerprint, linear_sites
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import GATE_FILE, WEIGHTS_FILE
from glider_dist.pool.calibration import CALIBRATION_FILE, made_for
from glider_dist.semantics.index import FILE
from glider_dist.testing import random_pool, tiny_causal


@pytest.fixture
def base() -> torch.nn.Module:
    return tiny_causal()


@pytest.fixture
def pool(tmp_path: Path, base: torch.nn.Module) -> ExpertPool:
    return random_pool(tmp_path / "pool", base, experts=["a", "b", "c"])


class Packed(nn.Module):
    """A linear layer that is no nn.Linear, as those of GPTQ, AWQ, HQQ and AQLM."""

    def __init__(self, layer: nn.Linear, says_widths: bool):
        super().__init__()
        if says_widths:
            self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("packed", layer.weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.packed.t()


def pack(model: Any, says_widths: bool) -> Any:
    for name in linear_sites(model):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Packed(model.get_submodule(name), says_widths))
    return model


def spoil(path: Path, value: float) -> str:
    tensors = load_file(path)
    key = sorted(tensors)[0]
    tensors[key].view(-1)[3] = value
    save_file(tensors, path)
    return key


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_expert_that_is_not_finite_is_named_and_not_attached(
    value: float, pool: ExpertPool, base: torch.nn.Module
) -> None:
    spoil(pool.expert("b").folder / WEIGHTS_FILE, value)
    with pytest.raises(GliderError, match=r"expert 'b' has values in lora_A at .* not finite; train it again"):
        gd.attach_pool(base, pool)
    base(torch.arange(4, 12)[None])


def test_a_base_whose_linear_layers_are_of_another_class_is_routed_like_the_plain_one(
    pool: ExpertPool, base: torch.nn.Module
) -> None:
    ids = torch.arange(4, 12)[None]
    packed = pack(tiny_causal(), says_widths=True)
    assert fingerprint(packed) == fingerprint(base)
    for model in (base, packed):
        gd.attach_pool(model, pool, RouterConfig(kind="phatgoose"))
    with torch.no_grad():
        assert torch.allclose(packed(ids).logits, base(ids).logits, rtol=0, atol=1e-4)
    assert gd.routing_stats(packed).keys() == gd.routing_stats(base).keys()


@pytest.mark.parametrize("kind", ["arrow", "merged"])
def test_a_base_in_which_no_linear_layer_is_found_is_refused_and_left_as_it_was(
    kind: str, pool: ExpertPool
) -> None:
    model = pack(tiny_causal(), says_widths=False)
    modules = list(model.modules())
    with pytest.raises(GliderError, match="one of the 0 linear layers of this LlamaForCausalLM"):
        gd.attach_pool(model, pool, RouterConfig(kind=kind))
    assert list(model.modules()) == modules
    with pytest.raises(GliderError, match="has no pool"):
        gd.detach(model)


def test_a_gate_that_is_not_finite_is_named(pool: ExpertPool, base: torch.nn.Module) -> None:
    site = spoil(pool.expert("c").folder / GATE_FILE, float("nan"))
    with pytest.raises(GliderError, match=f"gate of expert 'c' is not finite at {site}"):
        gd.attach_pool(base, pool)


def test_a_calibration_of_other_experts_is_warned_of_where_it_is_used(
    pool: ExpertPool, base: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    describe_and_index(pool)
    value = {"alpha_in": 7.0, "alpha_out": 2.0, "threshold": 0.4}
    value |= {"made_for": made_for(pool, pool.router_dir / FILE)}
    (pool.router_dir / CALIBRATION_FILE).write_text(json.dumps(value))
    caplog.clear()
    model = gd.attach_pool(base, pool)
    assert not caplog.records
    pool.remove("c")
    gd.detach(model)
    smaller = ExpertPool.open(pool.path)
    with caplog.at_level(logging.WARNING):
        gd.attach_pool(base, smaller, RouterConfig(kind="phatgoose"))
        assert not caplog.records
        gd.set_router(base, RouterConfig(), smaller)
    assert "was made for other experts than the pool has now; run calibrate again" in caplog.text


def test_another_router_of_an_attached_model_takes_the_pools_calibration(
    pool: ExpertPool, base: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    value = {"alpha_in": 7.0, "alpha_out": 2.0, "threshold": 0.4, "local_scores": ["gate", 1.0]}
    (pool.router_dir / CALIBRATION_FILE).parent.mkdir(exist_ok=True)
    (pool.router_dir / CALIBRATION_FILE).write_text(json.dumps(value))
    gd.attach_pool(base, pool, RouterConfig(kind="phatgoose"))
    with caplog.at_level(logging.WARNING):
        gd.set_router(base, RouterConfig(alpha_out=1.0))
        taken = context_of(base).router
        assert (taken.alpha_in, taken.alpha_out, taken.threshold) == (7.0, 1.0, 0.4)
        gd.set_router(base, RouterConfig(kind="global"))
        gd.set_router(base, RouterConfig(local="arrow", alpha_in=1.0, alpha_out=1.0, threshold=0.5))
        assert not caplog.records
        # Arrow's scores are on another scale than the gates', by which these alphas were chosen.
        gd.set_router(base, RouterConfig(local="arrow", temperature=0.5))
    assert "was made for the local scores ['gate', 1.0], this router has ['arrow', 0.5]" in caplog.text


def test_a_pool_attached_in_inference_mode_can_be_trained_through_later(tmp_path):
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=2)
    model = tiny_causal().requires_grad_(False)
    with torch.inference_mode():
        gd.attach_pool(model, pool, gd.RouterConfig(kind="phatgoose"))
    banks = context_of(model).banks
    for bank in banks.values():
        bank.A.requires_grad_()
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert all(bank.A.grad is not None for bank in banks.values())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": 0.0}, "router.temperature is 0.0, but must be positive and finite"),
        ({"top_k": 0}, "router.top_k is 0, but must be positive"),
        ({"top_k": 2.5}, "router.top_k is 2.5, but must be a whole number"),
        ({"top_k": "2"}, "router.top_k is '2', but must be a whole number"),
        ({"top_p": 1.5}, "router.top_p is 1.5, but must be more than 0 and at most 1"),
        ({"merge_density": 3}, "router.merge_density is 3, but must be more than 0"),
    ],
)
def test_a_number_that_a_router_cannot_have_is_refused_in_python_too(wrong, said, tmp_path):
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=2)
    model: Any = gd.attach_pool(tiny_causal(), pool)
    with pytest.raises(gd.GliderError, match=re.escape(said)):
        gd.set_router(model, gd.RouterConfig(**{"kind": "arrow", **wrong}))


def test_a_wrapped_model_is_refused_with_what_to_unwrap(pool):
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module

    adapted: Any = tiny_causal()
    adapted._hf_peft_config_loaded = True  # as transformers' add_adapter leaves it
    for wrapped in (
        Wrapper(tiny_causal()),
        get_peft_model(tiny_causal(), LoraConfig(target_modules=["q_proj"])),
        adapted,
    ):
        with pytest.raises(GliderError, match="attach the pool to the bare model"):
            gd.attach_pool(wrapped, pool)


def test_scores_and_experts_of_another_kind_are_told_before_the_forward(base, pool):
    model: Any = gd.attach_pool(base, pool)
    ids = torch.tensor([[3, 4, 5]])
    with gd.query_scores(model, [[0.1, 0.5, float("-inf")]]):
        assert model(input_ids=ids).logits.isfinite().all()
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(GliderError, match="NaN or infinity"), gd.query_scores(model, [[0.1, wrong, 0.2]]):
            pass
    with gd.assign_experts(model, [2]):
        model(input_ids=ids)
    for odd in (torch.tensor(1), torch.tensor([[1]]), torch.tensor([1.0])):
        with pytest.raises(GliderError, match=r"must be int64 \[batch\]"), gd.assign_experts(model, odd):
            pass


def test_numbers_of_numpy_are_numbers(base, pool):
    gd.attach_pool(base, pool, gd.RouterConfig(kind="phatgoose", top_k=np.int64(2)))
