"""Routers that need no training: against PEFT's own Arrow and merging, and against formulas in float64."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import ArrowConfig, PeftModel, create_arrow_model
from torch import nn

import glider_dist as gd
from glider_dist.bench.arrow import dominant_pool
from glider_dist.lora.bank import SiteBank, stack_site
from glider_dist.lora.lag import delta_norms, norm_factors
from glider_dist.lora.merge import merge_banks
from glider_dist.model.activations import average_activations
from glider_dist.model.attach import context_of, install
from glider_dist.model.base import load_base
from glider_dist.model.loading import load_banks
from glider_dist.model.stored import ACTIVATION_FILE, write_activations
from glider_dist.pool import SiteLora
from glider_dist.pool.adapter import WEIGHTS_FILE
from glider_dist.pool.files import write_tensors
from glider_dist.routing.local import arrow_prototypes
from glider_dist.testing import random_pool, tiny_causal, tiny_seq2seq

NEVER = float("-inf")
MODELS: dict[str, Callable[[], Any]] = {"llama": tiny_causal, "t5": tiny_seq2seq}
IDS = torch.tensor([[5, 9, 77, 130, 41, 200, 8], [60, 61, 5, 9, 250, 33, 7]])
ALPHAS: dict[str, Any] = {"alpha_in": 6.0, "alpha_out": 1.5, "threshold": 0.5}


def logits_of(model: Any) -> torch.Tensor:
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :4]
    with torch.no_grad():
        return model(**inputs).logits


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


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


# Formulas in float64 ----------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(inputs_embeds)


WIDTH = (16, 24)
RANKS = (1, 4, 0, 8, 3, 5, 4)
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


class Case:
    """One layer, its experts (rank 0: it lacks the layer), tokens and similarities, all float64."""

    def __init__(self, ranks: tuple[int, ...] = RANKS, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        d, o = WIDTH

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.layer = nn.Linear(d, o).double().requires_grad_(False)
        self.loras = [
            SiteLora(random(r, d) / d**0.5, random(o, r), 0.25 * (e + 1)) if r else None
            for e, r in enumerate(ranks)
        ]
        self.x = random(*MASK.shape, d)
        self.similarity = torch.rand(3, len(ranks), generator=generator, dtype=torch.float64) * 0.45
        self.similarity[0, 0] = 0.9
        if len(ranks) > 1:
            self.similarity[1, 1] = NEVER

    def attached(self, router: gd.RouterConfig, dtype: torch.dtype = torch.float64) -> OneLayer:
        model = OneLayer(copy.deepcopy(self.layer).to(dtype))
        bank = stack_site(self.loras, (WIDTH[1], WIDTH[0]), dtype)
        install(model, tuple(f"expert_{e}" for e in range(len(self.loras))), {"layer": bank}, {})
        gd.set_router(model, router)
        return model

    def formula(self, router: gd.RouterConfig) -> torch.Tensor:
        rows = []
        for query in range(self.x.shape[0]):
            for place in range(self.x.shape[1]):
                u = self.x[query, place]
                y = self.layer(u)
                if MASK[query, place]:
                    for e, w in self.served(router, query, u).items():
                        lora = self.loras[e]
                        assert lora is not None
                        y = y + w * lora.scale * (lora.B @ (lora.A @ u))
                rows.append(y)
        return torch.stack(rows).view(*self.x.shape[:2], -1)

    def served(self, router: gd.RouterConfig, query: int, u: torch.Tensor) -> dict[int, float]:
        bias = {e: 0.0 for e, lora in enumerate(self.loras) if lora is not None}
        if router.kind == "glider":
            cosine = self.similarity[query].clone()
            if router.shortlist is not None:
                cosine[cosine.argsort(descending=True)[router.shortlist :]] = NEVER
            alpha = router.alpha_in if float(cosine.max()) > router.threshold else router.alpha_out
            bias = {e: alpha * float(cosine[e]) for e in bias if cosine[e] != NEVER}
        near, norm = {}, {}
        for e in bias:
            lora = self.loras[e]
            assert lora is not None
            delta = lora.B @ lora.A
            near[e] = abs(float(torch.linalg.svd(delta).Vh[0] @ u)) / router.temperature + bias[e]
            norm[e] = float((lora.scale * (delta @ u)).norm()) / router.temperature + bias[e]
        z = near
        if "lag" in (router.kind, router.local):
            z = {e: norm[e] for e in sorted(near, key=lambda e: -near[e])[: router.lag_candidates]}
        ranked = sorted(z, key=lambda e: -z[e])
        kept = ranked[: router.top_k]
        if router.top_p is not None:
            total, mass, kept = sum(math.exp(v) for v in z.values()), 0.0, []
            for e in ranked[: router.top_p_max]:
                if mass >= router.top_p:
                    break
                kept.append(e)
                mass += math.exp(z[e]) / total
        return {e: math.exp(z[e]) / sum(math.exp(z[other]) for other in kept) for e in kept}


CASES: dict[str, dict[str, Any]] = {
    "arrow": {"kind": "arrow", "top_k": 2},
    "lag": {"kind": "lag", "top_k": 1, "lag_candidates": 3},
    "lag of two": {"kind": "lag", "top_k": 2, "lag_candidates": 4},
    "lag of all": {"kind": "lag", "top_k": 2, "lag_candidates": 50},
    "lag top-p": {"kind": "lag", "top_p": 0.7, "top_p_max": 3},
    "glider arrow": {"kind": "glider", "local": "arrow"},
    "glider lag": {"kind": "glider", "local": "lag", "lag_candidates": 3},
    "glider lag shortlist": {"kind": "glider", "local": "lag", "shortlist": 3},
    "glider lag short of candidates": {"kind": "glider", "local": "lag", "shortlist": 1},
    "glider lag top-p": {"kind": "glider", "local": "lag", "top_p": 0.7},
}


@pytest.mark.parametrize("small", [True, False], ids=["all", "rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_a_mixed_batch_equals_the_formula(name, dtype, small, monkeypatch):
    monkeypatch.setattr("glider_dist.model.routed.is_small", lambda tokens, bank: small)
    case = Case()
    router = gd.RouterConfig(temperature=0.7, **{**ALPHAS, **CASES[name]})
    model = case.attached(router, dtype)
    x = case.x.to(dtype).requires_grad_()
    with gd.query_scores(model, case.similarity.to(dtype)):
        ours = model(x, attention_mask=MASK)
    assert distance(ours.double(), case.formula(router)) < (1e-10 if dtype == torch.float64 else 1e-5)
    ours.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_norms_of_candidates_equal_the_deltas_norms():
    case = Case()
    bank = stack_site(case.loras, (WIDTH[1], WIDTH[0]), torch.float64)
    x = case.x.flatten(0, 1)
    candidates = torch.stack(
        [torch.randperm(7, generator=torch.Generator().manual_seed(t))[:3] for t in range(15)]
    )
    norms = delta_norms(x, bank, norm_factors(bank), candidates)
    for t in range(15):
        for c in range(3):
            lora = case.loras[int(candidates[t, c])]
            exact = 0.0 if lora is None else float((lora.scale * (lora.B @ (lora.A @ x[t]))).norm())
            assert float(norms[t, c]) == pytest.approx(exact, rel=1e-10, abs=1e-100)


@pytest.mark.parametrize("name", ["arrow", "lag", "glider lag"])
def test_a_zero_token_has_a_finite_gradient(name):
    model = Case().attached(gd.RouterConfig(**{**ALPHAS, **CASES[name]}))
    x = torch.zeros(1, 2, WIDTH[0], dtype=torch.float64, requires_grad=True)
    with gd.query_scores(model, torch.full((1, len(RANKS)), 0.2, dtype=torch.float64)):
        model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_general_experts_count_neither_for_the_threshold_nor_for_the_shortlist():
    case = Case(ranks=(4, 4, 4, 4))
    router = gd.RouterConfig(kind="glider", local="lag", general=["expert_0"], shortlist=2, **ALPHAS)
    model = case.attached(router)
    case.similarity[:, 0] = 0.99
    general = case.loras[0]
    assert general is not None
    with gd.query_scores(model, case.similarity):
        ours = model(case.x, attention_mask=MASK)
    rest = Case(ranks=(4, 4, 4, 4))
    rest.layer, rest.similarity = case.layer, case.similarity[:, 1:]
    rest.loras = [
        SiteLora(lora.A - general.A, lora.B - general.B, lora.scale) for lora in case.loras[1:] if lora is not None
    ]
    assert distance(ours, rest.formula(router)) < 1e-10


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "arrow", "general": ["expert_9"]}, ["router.general", "expert_9"]),
        ({"kind": "arrow", "top_k": 1, "general": ["expert_1"]}, ["router.general", "ranks 1, 3, 4, 5, 8"]),
        ({"kind": "ties"}, ["router.kind=ties", "one rank", "router.kind=merged"]),
        ({"kind": "dare"}, ["router.kind=dare", "one rank"]),
        ({"kind": "lag", "top_k": 3, "lag_candidates": 2}, ["router.top_k=3", "router.lag_candidates=2"]),
        ({"kind": "arrow", "top_k": 7, "general": ["expert_1"]}, ["router.top_k=7", "6 experts"]),
        ({"kind": "glider", "local": "svd"}, ["router.local='svd'", "arrow"]),
        ({"kind": "glider"}, ["gate", "router.kind=arrow"]),
        ({"kind": "average_activation"}, ["average_activation", "pool"]),
    ],
)
def test_what_a_router_cannot_do_is_refused_and_the_old_one_stays(settings, words):
    case = Case()
    model = case.attached(gd.RouterConfig(kind="arrow"))
    before = model(case.x, attention_mask=MASK)
    with pytest.raises(gd.GliderError) as refused:
        gd.set_router(model, gd.RouterConfig(**settings))
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert torch.equal(model(case.x, attention_mask=MASK), before)


# Merging against PEFT ---------------------------------------------------------------------------------------


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


# Prototypes in the pool -------------------------------------------------------------------------------------


def cache_of(pool: gd.ExpertPool) -> list[Path]:
    return sorted((pool.router_dir / "prototypes" / "arrow").glob("*.safetensors"))


def test_prototypes_are_cached_by_the_adapters_hash_and_an_expert_replaced_gets_new_ones(tmp_path, monkeypatch):
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=3, gates=False)
    router = gd.RouterConfig(kind="arrow")
    first = logits_of(gd.attach_pool(tiny_causal(), pool, router))
    assert len(cache_of(pool)) == 3
    made: list[int] = []

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        made.append(a.shape[0])
        return arrow_prototypes(a, b)

    monkeypatch.setattr("glider_dist.model.stored.arrow_prototypes", counted)
    assert torch.equal(logits_of(gd.attach_pool(tiny_causal(), pool, router)), first)
    assert not made

    other = random_pool(tmp_path / "other", tiny_causal(), experts=1, gates=False, seed=9).expert("expert_0")
    weights = (other.folder / WEIGHTS_FILE).read_bytes()
    target = pool.expert("expert_1").folder / WEIGHTS_FILE
    target.write_bytes(weights)  # behind the pool's back: the card still has the old hash
    later = (pool.expert("expert_1").folder / "card.json").stat().st_mtime + 10
    os.utime(target, (later, later))
    changed = logits_of(gd.attach_pool(tiny_causal(), pool, router))
    assert set(made) == {1}
    assert len(cache_of(pool)) == 4
    fresh = tiny_causal()
    banks, _ = load_banks(fresh, pool, torch.float32, with_gates=False)
    install(fresh, pool.names, banks, {})
    gd.set_router(fresh, router)
    assert torch.equal(logits_of(fresh), changed)


def test_a_broken_cache_file_is_made_again_and_a_read_only_pool_serves(tmp_path, monkeypatch):
    pool = random_pool(tmp_path, tiny_causal(), experts=2, gates=False)
    router = gd.RouterConfig(kind="lag")
    first = logits_of(gd.attach_pool(tiny_causal(), pool, router))
    cache_of(pool)[0].write_bytes(b"broken")
    assert torch.equal(logits_of(gd.attach_pool(tiny_causal(), pool, router)), first)
    for path in cache_of(pool):
        path.unlink()

    def refuse(*_: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("glider_dist.model.stored.write_tensors", refuse)
    assert torch.equal(logits_of(gd.attach_pool(tiny_causal(), pool, router)), first)
    assert not cache_of(pool)


# Average activations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_average_activation_routes_by_the_mean_input_of_the_real_tokens(name, tmp_path):
    model = MODELS[name]()
    pool = random_pool(tmp_path, model, experts=3, gates=False)
    gd.attach_pool(model, pool, gd.RouterConfig(kind="base"))
    seen: dict[str, list[torch.Tensor]] = {}
    site = next(iter(context_of(model).banks))
    module = model.get_submodule(site)
    for index, expert in enumerate(pool.experts()):
        rows = IDS + index
        padded = torch.cat([torch.zeros(2, 2, dtype=torch.int64), rows], 1)
        mask = torch.cat([torch.zeros(2, 2, dtype=torch.int64), torch.ones_like(rows)], 1)
        inputs = {"input_ids": padded, "attention_mask": mask}
        if name == "t5":
            inputs["decoder_input_ids"] = rows[:, :3]
        hook = module.register_forward_pre_hook(
            lambda _, args, name=expert.name: seen.setdefault(name, []).append(args[0][:, 2:].flatten(0, 1))
        )
        means = average_activations(model, [inputs, inputs], index)
        hook.remove()
        assert torch.allclose(means[site], torch.cat(seen[expert.name]).mean(0), atol=1e-5)
        write_activations(expert, means, "a test")
        assert ACTIVATION_FILE in expert.card()["files"]
    gd.detach(model)
    gd.attach_pool(model, pool, gd.RouterConfig(kind="average_activation", top_k=2))
    ours = logits_of(model)
    # The same as PHATGOOSE with the means for gates.
    banks = context_of(model).banks
    gates = {site: torch.stack([_stored(expert)[site] for expert in pool.experts()]) for site in banks}
    gd.detach(model)
    install(model, pool.names, banks, gates)
    gd.set_router(model, gd.RouterConfig(kind="phatgoose", top_k=2))
    assert torch.equal(ours, logits_of(model))


def _stored(expert: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(expert.folder / ACTIVATION_FILE)


def test_missing_or_foreign_activations_are_refused_and_the_model_stays_bare(tmp_path):
    model = tiny_causal()
    pool = random_pool(tmp_path, model, experts=2, gates=False)
    router = gd.RouterConfig(kind="average_activation")
    with pytest.raises(gd.GliderError, match=r"expert_0.*average-activations"):
        gd.attach_pool(model, pool, router)
    for expert in pool.experts():
        write_tensors(
            expert.folder / ACTIVATION_FILE, {"x": torch.zeros(2)}, {"adapter": "other", "made_from": "x"}
        )
    with pytest.raises(gd.GliderError, match="other weights"):
        gd.attach_pool(model, pool, router)
    gd.attach_pool(model, pool, gd.RouterConfig(kind="arrow"))


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
