"""Training through routed layers: checkpointing, and a base that stays as it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from routed_cases import MODELS, ROWS, batch_of, error, logits_mask
from torch import nn

import glider_dist as gd
from glider_dist.model.attach import context_of
from glider_dist.model.base import load_base
from glider_dist.model.batch import Collator
from glider_dist.model.loading import load_banks
from glider_dist.model.routed import RoutedLinear
from glider_dist.model.sites import linear_sites
from glider_dist.testing import (
    random_pool,
    save_tiny_base,
)
from glider_dist.training.runner import assigned_nll, installed


def trainable(model: Any) -> list[torch.Tensor]:
    """Gates and experts of an attached model, as leaves with gradients."""
    context = context_of(model)
    found = [tensor for bank in context.banks.values() for tensor in (bank.A, bank.B)]
    found += list(context.gates.values())
    return [tensor.requires_grad_() for tensor in found]


@pytest.mark.parametrize("experts", [1, 5])
@pytest.mark.parametrize("name", ["llama", "t5", "bert", "bart"])
def test_gradient_checkpointing_changes_no_gradient_and_counts_nothing_twice(name, experts, way, pool_of):
    model = MODELS[name]().requires_grad_(False)
    pool = pool_of(name, experts)
    inputs = batch_of(model, ROWS, left=False)
    real = logits_mask(model, inputs)
    ids = torch.tensor([4, 0, 2]) % experts
    calls: Counter[str] = Counter()
    results = []
    for checkpointing in (False, True):
        banks, gates = load_banks(model, pool, torch.float32, with_gates=True)
        leaves = [tensor for bank in banks.values() for tensor in (bank.A, bank.B)] + list(gates.values())
        for leaf in leaves:
            leaf.requires_grad_()
        calls.clear()
        # The way in which the training stages turn it on.
        with installed(model, pool.names, (banks, gates), gated=True, checkpointing=checkpointing):
            for module in model.modules():
                if isinstance(module, RoutedLinear):
                    module.base.register_forward_pre_hook(lambda module, args: calls.update(["call"]))
            with gd.assign_experts(model, ids):
                loss = model(**inputs, use_cache=False).logits[real].pow(2).mean()
                loss.backward()
            results.append((loss.detach(), [leaf.grad for leaf in leaves], gd.routing_stats(model), calls["call"]))
    (loss, grads, stats, once), (other_loss, other_grads, other_stats, twice) = results
    assert twice >= 2 * once  # the activations really were recomputed
    assert torch.equal(loss, other_loss)
    for grad, other in zip(grads, other_grads, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None and other is not None:
            assert torch.allclose(grad, other, rtol=1e-6, atol=1e-9)
    assert sum(grad is not None and bool(grad.any()) for grad in grads) > len(grads) * 0.8
    assert stats.keys() == other_stats.keys()
    assert all(torch.equal(counts, other_stats[site]) for site, counts in stats.items())


@pytest.mark.parametrize("gated", [False, True], ids=["expert", "gate"])
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_training_step_with_recomputed_activations_equals_one_without(name, gated, tmp_path):
    base = load_base(str(save_tiny_base(tmp_path / "base", MODELS[name]())), "float32", "cpu")
    pool = random_pool(tmp_path / "pool", base.model, experts=1)
    collator = Collator(base, 64)
    encoded = [collator.encode("Input: a b c\nOutput:", " x"), collator.encode("Input: d\nOutput:", " long one")]
    results = []
    for checkpointing in (False, True):
        banks, gates = load_banks(base.model, pool, torch.float32, with_gates=True)
        leaves = [tensor.requires_grad_() for bank in banks.values() for tensor in (bank.A, bank.B)]
        if gated:
            leaves = [gate.requires_grad_() for gate in gates.values()]
        batch, ids, weights = collator.batch(encoded), torch.zeros(2, dtype=torch.int64), torch.full((2,), 0.1)
        with installed(base.model, pool.names, (banks, gates), gated=gated, checkpointing=checkpointing):
            nll = float(assigned_nll(base.model, batch, ids, weights).sum())
        results.append((nll, [leaf.grad for leaf in leaves]))
    (nll, grads), (other_nll, other_grads) = results
    assert nll == pytest.approx(other_nll, rel=1e-5)
    assert sum(grad is not None and bool(grad.any()) for grad in grads) > len(grads) * 0.8
    for grad, other in zip(grads, other_grads, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None and other is not None:
            assert error(other, grad.double()) < 1e-4


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_base_gets_no_gradient_and_keeps_its_bits_while_experts_learn(name, way, pool_of):
    model = MODELS[name]().requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gd.attach_pool(model, pool_of(name), gd.RouterConfig(kind="oracle"))
    leaves = trainable(model)
    start = [leaf.detach().clone() for leaf in leaves]
    inputs = batch_of(model, ROWS, left=False)
    optimizer = torch.optim.AdamW(leaves, lr=1e-2)
    losses = []
    for _ in range(5):
        with gd.assign_experts(model, torch.tensor([0, 3, 3])):
            loss = model(**inputs, use_cache=False).logits[logits_mask(model, inputs)].pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())
    for bank in context_of(model).banks.values():
        assert bank.A.grad is not None
        assert bank.A.grad[[0, 3]].any()
        assert not bank.A.grad[[1, 2, 4]].any()
    assert any(not torch.equal(leaf, old) for leaf, old in zip(leaves, start, strict=True))
    gd.detach(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_every_linear_layer_but_the_head_is_routed(tmp_path):
    for make in MODELS.values():
        model = make()
        expected = set(linear_sites(model))
        head = model.get_output_embeddings()
        gd.attach_pool(
            model, random_pool(Path(tmp_path) / type(model).__name__, model), gd.RouterConfig(kind="arrow")
        )
        assert {module.site for module in model.modules() if isinstance(module, RoutedLinear)} == expected
        assert isinstance(head, nn.Linear)
        assert not any(
            module is head for m in model.modules() if isinstance(m, RoutedLinear) for module in m.modules()
        )
