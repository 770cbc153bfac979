"""Experts assigned to whole queries, against the plain formula and against the path that sorts tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_cases import MODELS, ROWS, batch_of, logits_mask

import glider_dist as gd
from glider_dist.lora.bank import SiteBank
from glider_dist.lora.blocks import Blocks, add_blocks
from glider_dist.model.loading import load_banks
from glider_dist.training.runner import installed

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("experts", "blocks"),
    [
        ([0, 0, 1, 1, 2, 2], [0, 1, 2]),
        ([0, 0, 0, 0, 2, 2], [0, 0, 2]),
        ([1, 1, 1], [1]),
        ([0, 1, 1], [0, 1, 1]),
        ([2, 0, 2], [2, 0, 2]),
        ([], []),
    ],
)
def test_blocks_are_as_long_as_the_runs_of_one_expert_allow(experts, blocks):
    found = Blocks.of(experts, 3, CPU)
    assert found.expert.tolist() == blocks
    assert found.all_experts == (blocks == [0, 1, 2])


@settings(max_examples=60, deadline=None)
@given(
    experts=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    length=st.integers(1, 5),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rank=st.sampled_from([1, 2, 8]),
    gated=st.booleans(),
    in_order=st.booleans(),
)
def test_outputs_and_gradients_equal_the_formula_of_each_token(experts, length, widths, rank, gated, in_order):
    experts = sorted(experts) if in_order else experts
    torch.manual_seed(0)
    d_in, d_out = widths
    tokens = len(experts) * length
    x, y = torch.randn(tokens, d_in), torch.randn(tokens, d_out)
    a, b = torch.randn(5, rank, d_in), torch.randn(5, rank, d_out)
    gates, scale, upstream = torch.randn(5, d_in), torch.rand(5) + 0.5, torch.randn(tokens, d_out)
    leaves = [tensor.double().requires_grad_() for tensor in (x, y, a, b, gates)]
    x, y, a, b, gates = leaves
    # The scale has the dtype that a pool gives it.
    bank = SiteBank(a, b, scale, torch.ones(5, dtype=torch.bool))
    out = add_blocks(y, x, bank, Blocks.of(experts, 5, CPU), gates if gated else None)
    rows = []
    for token in range(tokens):
        e = experts[token // length]
        weight = torch.sigmoid(gates[e] @ x[token]) if gated else 1.0
        rows.append(y[token] + weight * scale[e].double() * (b[e].t() @ (a[e] @ x[token])))
    expected = torch.stack(rows)
    assert torch.allclose(out, expected, rtol=0, atol=1e-10)
    used = leaves if gated else leaves[:4]
    for mine, theirs in zip(
        torch.autograd.grad(out, used, upstream.double()),
        torch.autograd.grad(expected, used, upstream.double()),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("gated", [False, True], ids=["expert", "gate"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_padded_batch_gives_the_same_logits_gradients_and_counts_as_sorting_its_tokens(
    name, gated, left, pool_of, monkeypatch
):
    model = MODELS[name]().double().requires_grad_(False)
    pool, inputs = pool_of(name), batch_of(model, ROWS, left=left)
    real, calls, results = logits_mask(model, inputs), [], []

    def noted(*args):
        calls.append(args)
        return add_blocks(*args)

    monkeypatch.setattr("glider_dist.model.routed.add_blocks", noted)
    for fits in (True, False):
        monkeypatch.setattr(Blocks, "fit", lambda self, x, bank, fits=fits: fits)
        banks, gates = load_banks(model, pool, torch.float64, with_gates=True)
        leaves = [tensor for bank in banks.values() for tensor in (bank.A, bank.B)] + list(gates.values())
        for leaf in leaves:
            leaf.requires_grad_()
        with (
            installed(model, pool.names, (banks, gates), gated=gated, checkpointing=False),
            gd.assign_experts(model, torch.tensor([4, 0, 2])),
        ):
            logits = model(**inputs, use_cache=False).logits[real]
            logits.pow(2).mean().backward()
            results.append((logits.detach(), [leaf.grad for leaf in leaves], gd.routing_stats(model)))
        assert bool(calls) == fits
        calls.clear()
    (logits, grads, stats), (other_logits, other_grads, other_stats) = results
    assert torch.allclose(logits, other_logits, rtol=0, atol=1e-10)
    for grad, other in zip(grads, other_grads, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None and other is not None:
            assert torch.allclose(grad, other, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(counts, other_stats[site]) for site, counts in stats.items())
