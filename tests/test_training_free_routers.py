"""Routers that need no training: Arrow against PEFT's own, and which experts they choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import ArrowConfig, create_arrow_model
from routed_models import ALPHAS, NEVER
from training_free_cases import CASES, IDS, MASK, MODELS, WIDTH, Case, distance, logits_of

import glider_dist as gd
from glider_dist.bench.arrow import dominant_pool
from glider_dist.lora.bank import SiteBank
from glider_dist.model.attach import context_of
from glider_dist.model.base import load_base
from glider_dist.pool import SiteLora
from glider_dist.routing.local import arrow_prototypes
from glider_dist.testing import random_pool, tiny_causal


def peft_arrow(model: Any, pool: gd.ExpertPool, general: tuple[str, ...] = (), **config: Any) -> Any:
    paths = [str(expert.folder) for expert in pool.experts() if expert.name not in general]
    arrow = ArrowConfig(rng_seed=0, use_gks=bool(general), **config)
    return create_arrow_model(
        model, paths, arrow, general_adapter_paths=[str(pool.expert(name).folder) for name in general]
    ).eval()


# Arrow against PEFT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("general", [(), ("expert_1", "expert_3")], ids=["plain", "general"])
@pytest.mark.parametrize("name", MODELS)
def test_arrow_equals_pefts_own_where_one_direction_dominates(name, general, tmp_path):
    model = MODELS[name]()
    pool = dominant_pool(tmp_path, model, experts=5, rank=4)
    base = logits_of(model)
    theirs = logits_of(peft_arrow(MODELS[name](), pool, general, top_k=2, router_temperature=0.7))
    router = gd.RouterConfig(kind="arrow", top_k=2, temperature=0.7, general=list(general))
    ours = logits_of(gd.attach_pool(model, pool, router))
    assert distance(ours, theirs) < 1e-4
    assert distance(base, theirs) > 0.1
    for index in (1, 3) if general else ():
        assert all(int(counts[index]) == 0 for counts in gd.routing_stats(model).values())
    assert torch.equal(logits_of(gd.detach(model)), base)


def test_on_random_adapters_pefts_power_iteration_has_not_converged_and_ours_is_exact(tmp_path):
    model = tiny_causal()
    pool = random_pool(tmp_path, model, rank=8)
    arrow = peft_arrow(tiny_causal(), pool, top_k=2)
    logits_of(arrow)
    theirs_off, ours_off = 0.0, 0.0
    for site in pool.expert("expert_0").shapes():
        module = arrow.get_submodule(f"base_model.model.{site}")
        prototypes = module.lora_arrow["arrow_router"].prototypes
        for index, expert in enumerate(pool.experts()):
            lora = expert.weights()[site]
            exact = torch.linalg.svd((lora.B @ lora.A).double()).Vh[0]
            ours = arrow_prototypes(lora.A[None], lora.B[None])[0].double()
            ours_off = max(ours_off, 1 - abs(float(ours @ exact)))
            theirs_off = max(theirs_off, 1 - abs(float(prototypes[index].double() @ exact)))
    assert ours_off < 1e-5
    assert theirs_off > 1e-3
    ours = logits_of(gd.attach_pool(model, pool, gd.RouterConfig(kind="arrow", top_k=2)))
    assert distance(ours, logits_of(arrow)) > 1e-3


@pytest.mark.model
def test_on_smollm2_arrow_equals_pefts_own_and_differs_where_pefts_has_not_converged(tmp_path):
    made = {"one dominant direction": dominant_pool, "random adapters": random_pool}
    off = {}
    for name, make in made.items():
        base = load_base("smollm2-135m", "float32", "cpu")
        texts = ["Write the plural.\nInput: ox\nOutput:", "Good or bad?\nInput: a gorgeous film\nOutput:"]
        inputs = base.tokenizer(texts, return_tensors="pt", padding=True)
        pool = make(tmp_path / name, base.model, experts=4, rank=8)
        router = gd.RouterConfig(kind="arrow", top_k=2, temperature=0.7)
        with torch.no_grad():
            ours = gd.attach_pool(base.model, pool, router)(**inputs).logits[inputs["attention_mask"] > 0]
            bare = gd.detach(base.model)
            arrow = peft_arrow(bare, pool, top_k=2, router_temperature=0.7)
            theirs = arrow(**inputs).logits[inputs["attention_mask"] > 0]
        off[name] = distance(ours, theirs)
        most = float((ours - theirs).abs().max())
        print(f"SmolLM2, {name}: |ours - PEFT's| / |PEFT's| = {off[name]:.1e}, at most {most:.1e} in a logit")
    assert off["one dominant direction"] < 1e-4
    assert off["random adapters"] > 1e-3


# Choices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["arrow", "lag", "glider", "global"])
def test_without_gates_the_routers_by_weights_and_descriptions_run_in_a_mixed_batch(kind, tmp_path):
    """Each query's logits do not depend on what else is in the batch."""
    model = tiny_causal()
    pool = random_pool(tmp_path, model, gates=False)
    gd.attach_pool(model, pool, gd.RouterConfig(kind=kind, local="lag", top_k=2, **ALPHAS))
    similarity = torch.tensor([[0.9, 0.1, NEVER, 0.2, 0.1], [0.2, 0.3, 0.25, 0.1, NEVER]])
    with gd.query_scores(model, similarity):
        together = logits_of(model)
    for query in range(2):
        with gd.query_scores(model, similarity[query : query + 1]), torch.no_grad():
            alone = model(input_ids=IDS[query : query + 1]).logits
        assert torch.allclose(alone, together[query : query + 1], atol=1e-4)


def test_a_site_that_an_expert_lacks_keeps_its_own_experts_under_every_router():
    for name, settings in CASES.items():
        case = Case(ranks=(4, 0, 0))
        router = gd.RouterConfig(**{**ALPHAS, **settings, "top_k": 1})
        model = case.attached(router)
        bank: SiteBank = context_of(model).banks["layer"]
        bank.A[1:], bank.B[1:], bank.scale[1:] = 1e3, 1e3, 1.0
        with gd.query_scores(model, torch.full((3, 3), 0.3, dtype=torch.float64)):
            ours = model(case.x, attention_mask=MASK)
        lora = case.loras[0]
        assert lora is not None
        delta = lora.scale * case.x @ lora.A.t() @ lora.B.t() * MASK[..., None]
        assert distance(ours, case.layer(case.x) + delta) < 1e-10, name


def test_two_routers_in_turn_do_not_mix_up_their_prototypes_and_banks():
    case = Case(ranks=(4, 4, 4, 4))
    routers = [
        gd.RouterConfig(kind="arrow"),
        gd.RouterConfig(kind="arrow", general=["expert_1"]),
        gd.RouterConfig(kind="lag", general=["expert_2"]),
        gd.RouterConfig(kind="ties"),
        gd.RouterConfig(kind="ties", merge_density=0.9),
        gd.RouterConfig(kind="merged"),
        gd.RouterConfig(kind="lag"),
    ]
    alone = [case.attached(router)(case.x, attention_mask=MASK) for router in routers]
    assert all(not torch.allclose(a, b) for i, a in enumerate(alone) for b in alone[:i])
    model = case.attached(routers[0])
    for turn in (*range(7), *reversed(range(7))):
        gd.set_router(model, routers[turn])
        assert torch.equal(model(case.x, attention_mask=MASK), alone[turn])


def test_lag_prefers_the_larger_output_among_arrows_candidates():
    d, o = WIDTH
    direction = F.normalize(torch.ones(d, dtype=torch.float64), dim=0)
    column = torch.ones(o, 1, dtype=torch.float64)
    loras: list[SiteLora | None] = [SiteLora(direction[None], column * size, 1.0) for size in (1.0, 5.0, 3.0)]
    case = Case(ranks=(1, 1, 1))
    case.loras = loras
    model = case.attached(gd.RouterConfig(kind="lag", top_k=1))
    model(case.x, attention_mask=MASK)
    assert gd.routing_stats(model)["layer"].tolist() == [0, int(MASK.sum()), 0]
