"""The routed layer on odd inputs, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from routed_cases import make_case
from routed_models import ALPHAS
from transformers import XLNetConfig, XLNetLMHeadModel

import glider_dist as gd
from glider_dist.model.tokens import padding_mask
from glider_dist.testing import (
    random_pool,
    tiny_causal,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["loop", "grouped"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no rows", "no columns"])
@pytest.mark.parametrize("kind", ["glider", "arrow", "merged", "topp"])
def test_an_empty_batch_passes(kind, shape, dtype, way):
    case = make_case()
    model, _ = case.attached(dtype)
    router = gd.RouterConfig(**ALPHAS)
    gd.set_router(model, replace(router, top_p=0.5) if kind == "topp" else replace(router, kind=kind))
    with gd.query_scores(model, torch.rand(shape[0], 6)):
        y = model(torch.zeros(*shape, 16, dtype=dtype), attention_mask=torch.ones(shape, dtype=torch.int64))
    assert y.shape == (*shape, 24)


@pytest.mark.parametrize("kind", ["glider", "arrow", "topp"])
def test_a_batch_of_padding_alone_gets_the_base_output(kind, way):
    case = make_case()
    model, _ = case.attached(torch.float32)
    router = gd.RouterConfig(**ALPHAS)
    gd.set_router(model, replace(router, top_p=0.5) if kind == "topp" else replace(router, kind=kind))
    x = case.x.detach().float()
    with gd.query_scores(model, case.similarity.detach()):
        y = model(x, attention_mask=torch.zeros_like(case.mask))
    assert torch.equal(y, case.layer.float()(x))
    assert gd.routing_stats(model)["layer"].sum() == 0


@pytest.mark.parametrize("kind", ["glider", "arrow"])
def test_the_same_input_tensor_under_another_mask_or_with_new_content_is_not_taken_for_the_old_one(kind, way):
    case = make_case()
    model, _ = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind=kind, **ALPHAS))
    x = case.x.detach().clone()
    with gd.query_scores(model, case.similarity.detach()):
        model(x, attention_mask=case.mask)
        other = case.mask.flip(0)
        assert torch.equal(model(x, attention_mask=other), model(x.clone(), attention_mask=other))
        x.copy_(case.x.detach().flip(1))
        assert torch.equal(model(x, attention_mask=other), model(x.clone(), attention_mask=other))


@pytest.mark.parametrize(
    ("base", "experts"),
    [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("kind", ["glider", "arrow", "merged", "oracle"])
def test_experts_may_have_another_dtype_than_the_base(kind, base, experts, way, tmp_path):
    model = tiny_causal().to(base)
    gd.attach_pool(model, random_pool(tmp_path, model), gd.RouterConfig(kind=kind, **ALPHAS), dtype=experts)
    ids = torch.arange(12).view(2, 6) + 5
    with torch.no_grad(), gd.query_scores(model, torch.rand(2, 5)):
        if kind == "oracle":
            with gd.assign_experts(model, torch.tensor([1, 3])):
                logits = model(ids).logits
        else:
            logits = model(ids).logits
    assert logits.dtype == base
    assert logits.isfinite().all()


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_padding_is_read_from_a_mask_of_queries_and_keys_as_well(dtype, kind, left):
    rows = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    rows = (rows if left else rows.flip(1)).bool()
    allowed = rows[:, None, None, :].expand(-1, 1, 5, -1)
    allowed = allowed & torch.ones(5, 5).tril().bool() if kind == "causal" else allowed
    mask = allowed if dtype == torch.bool else torch.zeros(allowed.shape, dtype=dtype)
    mask = mask if dtype == torch.bool else mask.masked_fill(~allowed, torch.finfo(dtype).min)
    for given in (mask, {"sliding_attention": None, "full_attention": mask}):
        assert torch.equal(padding_mask(given), rows)
    if kind == "causal" and left:
        # Room for what will be generated.
        roomy = torch.nn.functional.pad(mask, (0, 4), value=0 if dtype == torch.bool else -torch.inf)
        assert torch.equal(padding_mask(roomy), rows)


@pytest.mark.parametrize("mask", [None, {}, {"full_attention": None}, "a block mask"])
def test_what_is_no_mask_of_padding_is_none(mask):
    assert padding_mask(mask) is None


def test_a_layer_called_outside_its_model_says_so():
    case = make_case()
    model, _ = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind="phatgoose"))
    with pytest.raises(gd.GliderError, match="call the model"):
        model.layer(case.x)


def test_a_model_whose_layers_take_the_length_before_the_batch_is_refused_where_tokens_are_told_apart(tmp_path):
    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = XLNetLMHeadModel(config).eval()
    gd.attach_pool(model, random_pool(tmp_path, model), gd.RouterConfig(kind="phatgoose"))
    ids = torch.arange(14).view(2, 7) + 5
    with torch.no_grad():
        with pytest.raises(gd.GliderError, match=r"got input \[7, 2, 32\], but its stack has 2 rows of 7"):
            model(ids)
        gd.set_router(model, gd.RouterConfig(kind="merged"))
        assert model(ids).logits.isfinite().all()


def test_a_router_with_a_global_part_says_that_it_needs_scores():
    case = make_case()
    model, _ = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind="glider", **ALPHAS))
    with pytest.raises(gd.GliderError, match="query_scores"):
        model(case.x)


@pytest.mark.parametrize("wrong", [(2, 6), (3, 5), (6,)])
def test_scores_of_a_wrong_shape_are_refused(wrong):
    case = make_case()
    model, _ = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind="glider", **ALPHAS))
    with pytest.raises(gd.GliderError), gd.query_scores(model, torch.rand(wrong)):
        model(case.x, attention_mask=case.mask)


@pytest.mark.parametrize("ids", [[0, 1, 6], [0, -1, 1]])
def test_assigning_an_expert_that_does_not_exist_is_refused(ids):
    case = make_case()
    model, _ = case.attached(torch.float64)
    with pytest.raises(gd.GliderError, match="expert"), gd.assign_experts(model, torch.tensor(ids)):
        model(case.x, attention_mask=case.mask)


def test_scores_and_assignments_end_with_their_block_even_after_an_error():
    case = make_case()
    model, _ = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind="glider", **ALPHAS))
    ids = torch.zeros(3, dtype=torch.int64)
    with (
        pytest.raises(ZeroDivisionError),
        gd.query_scores(model, case.similarity),
        gd.assign_experts(model, ids),
    ):
        _ = 1 // 0
    with pytest.raises(gd.GliderError, match="query_scores"):
        model(case.x)
