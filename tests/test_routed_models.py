"""Whole models: padding, statistics, detaching, permutations, idle experts."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from routed_cases import ABSOLUTE, CHOICES, MODELS, ROWS, SIMILARITY, batch_of, logits_mask
from routed_models import ALL_WAYS, ALPHAS, CAUSAL
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

import glider_dist as gd
from glider_dist.lora.bank import SiteBank
from glider_dist.model.attach import context_of, install
from glider_dist.model.loading import load_banks
from glider_dist.testing import (
    random_pool,
    tiny_causal,
    tiny_seq2seq,
)


@pytest.mark.parametrize("kind", ["glider", "arrow", "topp", "oracle"])
@pytest.mark.parametrize(
    ("name", "left"), [(n, s) for n in MODELS for s in (True, False) if (n, s) not in ABSOLUTE]
)
def test_padding_changes_no_logit_of_a_real_token(name, left, kind, way, pool_of):
    model = MODELS[name]()
    router = gd.RouterConfig(**ALPHAS)
    router = replace(router, top_p=0.6) if kind == "topp" else replace(router, kind=kind)
    gd.attach_pool(model, pool_of(name), router)
    inputs = batch_of(model, ROWS, left)

    @torch.no_grad()
    def run(rows: slice, these: dict[str, torch.Tensor]) -> torch.Tensor:
        with gd.query_scores(model, SIMILARITY[rows]):
            if kind == "oracle":
                with gd.assign_experts(model, torch.tensor([4, 0, 2])[rows]):
                    return model(**these).logits
            return model(**these).logits

    together = run(slice(None), inputs)
    real = logits_mask(model, inputs)
    for i in range(len(ROWS)):
        alone = {
            key: value[i : i + 1, inputs[mask][i].bool()]
            for key, value in inputs.items()
            for mask in ["decoder_attention_mask" if key.startswith("decoder") else "attention_mask"]
        }
        theirs = run(slice(i, i + 1), alone)[0]
        assert torch.allclose(together[i, real[i]], theirs, rtol=0, atol=2e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_stats_count_each_real_token_once_per_place_and_padding_never(name, left, way, pool_of):
    model = MODELS[name]()
    gd.attach_pool(model, pool_of(name), gd.RouterConfig(kind="phatgoose", top_k=2))
    inputs = batch_of(model, ROWS, left)
    with torch.no_grad():
        model(**inputs)
    stats = gd.routing_stats(model)
    assert set(stats) == set(context_of(model).banks)
    for site, counts in stats.items():
        tokens = int(inputs["attention_mask"].sum())
        if "decoder_attention_mask" in inputs and "decoder." in site and not reads_encoder(site):
            tokens = int(inputs["decoder_attention_mask"].sum())
        if "pooler" in site:  # sees the first token of each row alone
            tokens = len(ROWS)
        assert counts.sum() == 2 * tokens, site
        assert counts.shape == (5,)
    with torch.no_grad():
        model(**inputs)
    assert all(torch.equal(twice, 2 * stats[site]) for site, twice in gd.routing_stats(model).items())
    gd.reset_routing_stats(model)
    assert gd.routing_stats(model) == {}


@pytest.mark.parametrize("name", MODELS)
def test_after_a_forward_no_input_of_a_layer_is_kept(name, pool_of):
    model = MODELS[name]()
    gd.attach_pool(model, pool_of(name), gd.RouterConfig(kind="phatgoose", top_k=2))
    seen: list[weakref.ref[torch.Tensor]] = []
    for site in context_of(model).banks:
        # The encoder's states serve every decoding step.
        if not reads_encoder(site):
            module = model.get_submodule(site)
            module.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    with torch.no_grad():
        model(**batch_of(model, ROWS, name in CAUSAL))
    assert seen
    assert not [ref for ref in seen if ref() is not None]


def reads_encoder(site: str) -> bool:
    """True for the keys and values of a cross-attention (T5, BERT and BART names)."""
    cross = any(name in site for name in ("EncDecAttention", "crossattention", "encoder_attn"))
    return cross and site.rsplit(".", 1)[-1] in ("k", "v", "key", "value", "k_proj", "v_proj")


def test_encoder_states_given_again_with_another_mask_are_seen_with_that_mask(tmp_path):
    model = tiny_seq2seq()
    gd.attach_pool(model, random_pool(tmp_path, model), gd.RouterConfig(**ALPHAS))
    inputs = batch_of(model, ROWS, left=False)
    wide = inputs["attention_mask"]
    narrow = wide.clone()
    narrow[:, 2:] = 0

    @torch.no_grad()
    def decode(states: Any, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        gd.reset_routing_stats(model)
        rest = {key: value for key, value in inputs.items() if key.startswith("decoder")}
        logits = model(encoder_outputs=states, attention_mask=mask, **rest).logits
        return logits, gd.routing_stats(model)

    with gd.query_scores(model, SIMILARITY), torch.no_grad():
        states = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=wide)
        for mask in (wide, narrow, wide):
            logits, counts = decode(states, mask)
            fresh = copy.copy(states)
            fresh.last_hidden_state = states.last_hidden_state.clone()
            expected, expected_counts = decode(fresh, mask)
            assert torch.equal(logits, expected)
            assert all(torch.equal(counts[site], value) for site, value in expected_counts.items())
            assert counts["decoder.block.0.layer.1.EncDecAttention.k"].sum() == 2 * int(mask.sum())


def test_an_encoder_and_a_decoder_of_different_widths_are_joined_by_a_routed_projection(tmp_path):
    size = {"vocab_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(hidden_size=32, **size),
        BertConfig(hidden_size=48, **size),
        decoder_start_token_id=3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = EncoderDecoderModel(config).eval()
    gd.attach_pool(model, random_pool(tmp_path, model), gd.RouterConfig(kind="phatgoose"))
    inputs = batch_of(model, ROWS, left=False)
    with torch.no_grad():
        together = model(**inputs).logits
    assert gd.routing_stats(model)["enc_to_dec_proj"].sum() == 2 * int(inputs["attention_mask"].sum())
    alone = {key: value[2:] for key, value in inputs.items()}
    alone["input_ids"], alone["attention_mask"] = alone["input_ids"][:, :2], alone["attention_mask"][:, :2]
    with torch.no_grad():
        theirs = model(**alone).logits
    assert torch.allclose(together[2:], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_detaching_gives_back_the_same_modules_bits_and_names(name, pool_of):
    model = MODELS[name]()
    modules = {key: id(module) for key, module in model.named_modules()}
    keys = list(model.state_dict())
    values = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    inputs = batch_of(model, ROWS, left=False)
    with torch.no_grad():
        before = model(**inputs).logits
        gd.attach_pool(model, pool_of(name), gd.RouterConfig(kind="phatgoose"))
        assert not torch.allclose(model(**inputs).logits, before, atol=1e-3)
        gd.set_router(model, gd.RouterConfig(kind="base"))
        assert torch.equal(model(**inputs).logits, before)
        gd.detach(model)
        assert torch.equal(model(**inputs).logits, before)
    assert {key: id(module) for key, module in model.named_modules()} == modules
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    with pytest.raises(gd.GliderError, match="no pool"):
        gd.routing_stats(model)


@pytest.mark.parametrize("name", ["llama", "qwen", "t5"])
def test_an_attached_model_is_saved_and_loaded_as_its_base(name, pool_of, tmp_path):
    model = MODELS[name]()
    keys = list(model.state_dict())
    gd.attach_pool(model, pool_of(name), gd.RouterConfig(kind="phatgoose"))
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    plain = MODELS[name](seed=1)
    found = type(plain).from_pretrained(tmp_path).state_dict()
    values = gd.detach(model).state_dict()
    assert all(torch.equal(found[key], value) for key, value in values.items())
    gd.attach_pool(plain, pool_of(name), gd.RouterConfig(kind="phatgoose"))
    plain.load_state_dict(values)
    assert all(torch.equal(values[key], value) for key, value in gd.detach(plain).state_dict().items())


def test_an_attached_model_is_not_copied_until_it_is_detached(pool_of):
    model = MODELS["llama"]()
    gd.attach_pool(model, pool_of("llama"), gd.RouterConfig(kind="phatgoose"))
    with pytest.raises(gd.GliderError, match=r"cannot be copied; call glider_dist.detach\(model\) first"):
        copy.deepcopy(model)
    gd.detach(model)
    assert copy.deepcopy(model) is not model


def test_permuting_the_experts_permutes_the_stats_and_nothing_else(way, tmp_path):
    model = tiny_causal()
    order = torch.tensor([3, 0, 4, 1, 2])
    sites = [None, ["self_attn.q_proj", "mlp.up_proj"], None, None, ["down_proj"]]
    one = random_pool(tmp_path / "one", model, ranks=[1, 4, 8, 3, 5], sites=sites)
    two = gd.ExpertPool.create(tmp_path / "two", base=one.base, fingerprint=one.fingerprint)
    for place, index in enumerate(order.tolist()):
        expert = one.expert(one.names[index])
        two.add(f"other_{place}", adapter=expert.folder, gate=expert.folder / "gate.safetensors")
    inputs = batch_of(model, ROWS, left=True)
    for choice in CHOICES.values():
        router = gd.RouterConfig(**ALPHAS, **choice)
        found = []
        for pool, similarity in ((one, SIMILARITY), (two, SIMILARITY[:, order])):
            gd.attach_pool(model, pool, router)
            with torch.no_grad(), gd.query_scores(model, similarity):
                found.append((model(**inputs).logits, gd.routing_stats(model)))
            gd.detach(model)
        (logits, stats), (other_logits, other_stats) = found
        real = inputs["attention_mask"].bool()
        assert torch.allclose(logits[real], other_logits[real], rtol=0, atol=1e-4)
        assert all(torch.equal(counts[order], other_stats[site]) for site, counts in stats.items())


def test_experts_that_share_no_layer_are_each_served_where_they_are(way, tmp_path):
    model = tiny_causal()
    sites = [["q_proj"], ["down_proj"], ["q_proj", "up_proj"]]
    gd.attach_pool(model, random_pool(tmp_path, model, experts=3, sites=sites), gd.RouterConfig(kind="phatgoose"))
    inputs = batch_of(model, ROWS, left=True)
    with torch.no_grad():
        model(**inputs)
    tokens = int(inputs["attention_mask"].sum())
    for site, counts in gd.routing_stats(model).items():
        expected = {"q_proj": [tokens, 0, tokens], "down_proj": [0, tokens, 0], "up_proj": [0, 0, tokens]}
        assert counts.tolist() == expected[site.rsplit(".", 1)[-1]], site


def test_merged_equals_peft_add_weighted_adapter(tmp_path):
    from peft import PeftModel

    model = tiny_causal()
    pool = random_pool(tmp_path, model, ranks=[1, 4, 8, 3, 5])
    inputs = batch_of(model, ROWS, left=True)
    gd.attach_pool(model, pool, gd.RouterConfig(kind="merged"))
    with torch.no_grad():
        ours = model(**inputs).logits
    gd.detach(model)
    peft = PeftModel.from_pretrained(model, pool.expert(pool.names[0]).folder, adapter_name=pool.names[0])
    for name in pool.names[1:]:
        peft.load_adapter(pool.expert(name).folder, adapter_name=name)
    peft.add_weighted_adapter(list(pool.names), [1 / 5] * 5, "mean", combination_type="cat")
    peft.set_adapter("mean")
    with torch.no_grad():
        theirs = peft.eval()(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.allclose(ours[real], theirs[real], rtol=0, atol=1e-4)


class CountedOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


@ALL_WAYS
@pytest.mark.parametrize("router", [{}, {"top_p": 0.5, "top_p_max": 4}, {"kind": "arrow"}])
def test_idle_experts_add_no_operation_to_a_forward(router, way, pool_of):
    model = tiny_causal()
    inputs = batch_of(model, ROWS, left=True)
    few_banks, few_gates = load_banks(model, pool_of("llama", 8), torch.float32, with_gates=True)
    ops = []
    for times in (32, 64):  # either way the experts outnumber the rows
        experts = 8 * times
        banks = {
            site: SiteBank(
                bank.A.repeat(times, 1, 1),
                bank.B.repeat(times, 1, 1),
                bank.scale.repeat(times),
                bank.eligible.repeat(times),
            )
            for site, bank in few_banks.items()
        }
        gates = {site: gate.repeat(times, 1) for site, gate in few_gates.items()}
        install(model, tuple(f"expert_{e}" for e in range(experts)), banks, gates)
        gd.set_router(model, gd.RouterConfig(**ALPHAS, **router))
        similarity = torch.full((len(ROWS), experts), -1e4)
        similarity[:, :8] = 0.3
        with torch.no_grad(), gd.query_scores(model, similarity):
            model(**inputs)  # prototypes are made once
            with CountedOps() as counted:
                model(**inputs)
        ops.append(counted.ops)
        gd.detach(model)
    assert sum(ops[0].values()) > 100
    assert any("grouped_mm" in name for name in ops[0]) == (way == "sorted")
    assert {name: (ops[0][name], ops[1][name]) for name in ops[0] | ops[1] if ops[0][name] != ops[1][name]} == {}
