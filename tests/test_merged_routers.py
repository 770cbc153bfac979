"""Merged experts (ties, dare, mean) against PEFT's own merging."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from training_free_cases import MODELS, Case, distance, logits_of

import glider_dist as gd
from glider_dist.lora.bank import stack_site
from glider_dist.lora.merge import merge_banks
from glider_dist.testing import random_pool


def peft_merged(model: Any, pool: gd.ExpertPool, method: str, weight: float, density: float, seed: int) -> Any:
    first, *others = pool.experts()
    peft = PeftModel.from_pretrained(model, str(first.folder), adapter_name=first.name)
    for expert in others:
        peft.load_adapter(str(expert.folder), adapter_name=expert.name)
    names, weights = list(pool.names), [weight] * len(pool)
    with torch.random.fork_rng(devices=[]):
        # inject_adapter draws initial weights for the new adapter, which come before the merging's.
        peft.add_weighted_adapter(names, weights, "warm_up", combination_type=method, density=density)
        peft.delete_adapter("warm_up")
        original = peft.base_model._generalized_task_arithmetic_weighted_adapter
        seeded = []

        def with_seed(*args: Any) -> Any:
            if not seeded:
                torch.manual_seed(seed)
                seeded.append(True)
            return original(*args)

        peft.base_model._generalized_task_arithmetic_weighted_adapter = with_seed
        peft.add_weighted_adapter(names, weights, "merged", combination_type=method, density=density)
    peft.set_adapter("merged")
    return peft.eval()


@pytest.mark.parametrize("density", [0.5, 0.2])
@pytest.mark.parametrize("kind", ["ties", "dare"])
@pytest.mark.parametrize("name", MODELS)
def test_ties_and_dare_equal_pefts_add_weighted_adapter(name, kind, density, tmp_path):
    model = MODELS[name]()
    pool = random_pool(tmp_path, model, rank=3, gates=False)
    method, weight = {"ties": ("ties", 1.0), "dare": ("dare_linear", 1 / len(pool))}[kind]
    theirs = logits_of(peft_merged(MODELS[name](), pool, method, weight, density, seed=5))
    base = logits_of(model)
    ours = logits_of(gd.attach_pool(model, pool, gd.RouterConfig(kind=kind, merge_density=density, merge_seed=5)))
    assert distance(ours, theirs) < 1e-5
    assert distance(base, theirs) > 0.01


def test_dare_drops_other_weights_with_another_seed_and_leaves_the_global_generator_alone():
    banks = {"layer": stack_site(Case(ranks=(4, 4, 4)).loras, (24, 16), torch.float32)}
    state = torch.get_rng_state()
    first, again, other = (merge_banks(banks, "dare", 0.5, seed)["layer"].A for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["ties", "dare", "merged"])
def test_a_merged_pool_of_one_expert_is_that_expert(kind):
    case = Case(ranks=(4,))
    model = case.attached(gd.RouterConfig(kind=kind))
    lora = case.loras[0]
    assert lora is not None
    expected = case.layer(case.x) + lora.scale * case.x @ lora.A.t() @ lora.B.t()
    assert distance(model(case.x), expected) < 1e-7
