"""The routed layer against the plain formula, written out below as loops over tokens and experts in float64."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

import glider_dist as gd
from glider_dist.config import Config
from glider_dist.lora.apply import count_rows, plan_rows
from glider_dist.lora.bank import SiteBank, stack_site
from glider_dist.model.attach import context_of, install
from glider_dist.model.base import load_base
from glider_dist.model.batch import Collator
from glider_dist.model.engine import FrozenBase
from glider_dist.model.loading import load_banks
from glider_dist.model.routed import RoutedLinear
from glider_dist.model.sites import linear_sites
from glider_dist.parallel.ranks import Ranks
from glider_dist.pool import SiteLora
from glider_dist.routing.route import Route, top_k_route, top_p_route
from glider_dist.testing import (
    random_pool,
    save_tiny_base,
    tiny_causal,
    tiny_encoder_decoder,
    tiny_qwen,
    tiny_seq2seq,
)
from glider_dist.training.experts import _installed
from glider_dist.training.fit import Runner

NEVER = float("-inf")
ALONE = Ranks(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"), control=None)
SMALL = {"layers": 2, "ffn_dim": 80, "attention_heads": 4}


def tiny_bart() -> Any:
    """Its blocks apply dropout themselves, as T5's do not."""
    size = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in SMALL.items()}
    config = BartConfig(vocab_size=256, max_position_embeddings=64, d_model=48, init_std=0.15, **size)
    torch.manual_seed(0)
    return BartForConditionalGeneration(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_causal,
    "qwen": tiny_qwen,
    "t5": tiny_seq2seq,
    "bert": tiny_encoder_decoder,
    "bart": tiny_bart,
}
# With absolute positions, padding on the left moves the tokens.
ABSOLUTE = {("bert", True), ("bart", True)}
ALPHAS: dict[str, Any] = {"alpha_in": 6.0, "alpha_out": 1.5, "threshold": 0.5}
CHOICES: dict[str, dict[str, Any]] = {
    "top1": {"top_k": 1},
    "top2": {"top_k": 2},
    "top3": {"top_k": 3},
    "topp.25": {"top_p": 0.25},
    "topp.5": {"top_p": 0.5},
    "topp.9": {"top_p": 0.9},
    "topp.9max2": {"top_p": 0.9, "top_p_max": 2},
}


# The formula ------------------------------------------------------------------------------------------------


def served(scores: dict[int, torch.Tensor], router: gd.RouterConfig) -> dict[int, torch.Tensor]:
    """The experts of one token and their weights, from the scores of those it may use."""
    ranked = sorted(scores, key=lambda e: -float(scores[e]))
    if router.top_p is None:
        kept = ranked[: router.top_k]
    else:
        total = sum(math.exp(float(scores[e])) for e in ranked)
        kept, mass = [], 0.0
        for e in ranked[: router.top_p_max]:
            if mass >= router.top_p:
                break
            kept.append(e)
            mass += math.exp(float(scores[e])) / total
    total_kept = sum((scores[e].exp() for e in kept), torch.zeros((), dtype=torch.float64))
    return {e: scores[e].exp() / total_kept for e in kept}


def token_scores(case: Case, router: gd.RouterConfig, query: int, u: torch.Tensor) -> dict[int, torch.Tensor]:
    d = u.shape[0]
    scores = {}
    best = max((float(c) for c in case.similarity[query]), default=NEVER)
    alpha = router.alpha_in if best > router.threshold else router.alpha_out
    for e, lora in enumerate(case.loras):
        if lora is None or (router.kind in ("glider", "global") and case.similarity[query, e] == NEVER):
            continue
        z = torch.zeros((), dtype=torch.float64)
        if router.kind in ("glider", "phatgoose"):
            z = F.layer_norm(u, (d,)) @ F.layer_norm(case.gates[e].detach(), (d,)) / math.sqrt(d)
        if router.kind == "arrow":
            delta = (lora.B @ lora.A).detach()
            z = (torch.linalg.svd(delta).Vh[0] @ u).abs() / router.temperature
        if router.kind in ("glider", "global"):
            z = z + alpha * case.similarity[query, e]
        scores[e] = z
    return scores


def dense(case: Case, weights: Callable[[int, torch.Tensor], dict[int, torch.Tensor]]) -> torch.Tensor:
    """``W u + b + Σ_e w_e s_e B_e A_e u`` for every real token, ``W u + b`` for padding."""
    rows = []
    for query in range(case.x.shape[0]):
        for place in range(case.x.shape[1]):
            u = case.x[query, place]
            y = case.layer.weight @ u + case.layer.bias
            if case.mask[query, place]:
                for e, w in weights(query, u).items():
                    lora = case.loras[e]
                    if lora is not None:
                        y = y + w * lora.scale * (lora.B @ (lora.A @ u))
            rows.append(y)
    return torch.stack(rows).view(*case.x.shape[:2], -1)


@pytest.fixture(params=["rows", "all"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute a layer: rows sorted by expert, and every expert on every token."""
    monkeypatch.setattr("glider_dist.model.routed.is_small", lambda tokens, bank: request.param == "all")
    return request.param


# The cases --------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """A model of a single linear layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(inputs_embeds)


@dataclass
class Case:
    """Float64 leaves of the formula; ``attached`` makes the routed layer with the same values."""

    x: torch.Tensor
    mask: torch.Tensor
    layer: nn.Linear
    loras: list[SiteLora | None]
    gates: torch.Tensor
    similarity: torch.Tensor

    def leaves(self) -> dict[str, torch.Tensor]:
        found = {"x": self.x, "similarity": self.similarity, "gates": self.gates}
        for e, lora in enumerate(self.loras):
            if lora is not None:
                found |= {f"A{e}": lora.A, f"B{e}": lora.B}
        return found

    def attached(self, dtype: torch.dtype) -> tuple[OneLayer, SiteBank]:
        model = OneLayer(copy.deepcopy(self.layer).to(dtype).requires_grad_(False))
        shape = (self.layer.out_features, self.layer.in_features)
        bank = stack_site(
            [
                None if lora is None else SiteLora(lora.A.detach(), lora.B.detach(), lora.scale)
                for lora in self.loras
            ],
            shape,
            dtype,
        )
        bank.A.requires_grad_()
        bank.B.requires_grad_()
        gates = self.gates.detach().to(torch.promote_types(dtype, torch.float32))
        install(model, tuple(f"expert_{e}" for e in range(len(self.loras))), {"layer": bank}, {"layer": gates})
        return model, bank


def make_case(
    width: tuple[int, int] = (16, 24),
    ranks: tuple[int, ...] = (1, 4, 0, 8, 3, 5),
    mask: tuple[str, ...] = ("0011111", "1111111", "1111000"),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Rank 0 is an expert without the layer. Values are representable in ``dtype``, leaves are float64."""
    generator = torch.Generator().manual_seed(seed)
    d, o = width

    def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return value.to(dtype).double().requires_grad_()

    layer = nn.Linear(d, o).double()
    with torch.no_grad():
        layer.weight.copy_(leaf(o, d, scale=d**-0.5))
        layer.bias.copy_(leaf(o))
    loras = [
        SiteLora(leaf(r, d, scale=d**-0.5), leaf(o, r), 0.25 * (e + 1)) if r else None for e, r in enumerate(ranks)
    ]
    rows = torch.tensor([[int(c) for c in row] for row in mask])
    similarity = torch.rand(len(mask), len(ranks), generator=generator, dtype=torch.float64) * 0.45
    similarity[0, 0], similarity[-1, -1] = 0.9, 0.6
    if len(mask) > 1 and len(ranks) > 1:
        similarity[1, 1] = NEVER
    similarity = similarity.to(dtype).double().requires_grad_()
    return Case(leaf(*rows.shape, d), rows, layer, loras, leaf(len(ranks), d), similarity)


def error(ours: torch.Tensor, formula: torch.Tensor) -> float:
    """Norm of the difference over the norm, or over 1e-3 where the formula's gradient is 0 but for rounding."""
    assert ours.isfinite().all()
    return float((ours.double() - formula).norm() / formula.norm().clamp_min(1e-3))


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]


def compare_gradients(case: Case, bank: SiteBank, leaves: dict[str, torch.Tensor], limit: float) -> None:
    """Gradients of the routed layer's leaves against those already in ``case``."""
    for name, value in leaves.items():
        reference = case.leaves()[name].grad
        if reference is None:
            assert value.grad is None or not value.grad.any(), name
        else:
            assert value.grad is not None, name
            assert error(value.grad, reference) < limit, name
    for e, lora in enumerate(case.loras):
        rank = lora.A.shape[0] if lora is not None else 0
        assert bank.A.grad is not None
        assert bank.B.grad is not None
        assert not bank.A.grad[e, rank:].any()
        assert not bank.B.grad[e, rank:].any()
        if lora is not None and lora.A.grad is not None and lora.B.grad is not None:
            assert error(bank.A.grad[e, :rank], lora.A.grad) < limit, f"A{e}"
            assert error(bank.B.grad[e, :rank].t(), lora.B.grad) < limit, f"B{e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("way", "width"), [("rows", (16, 24)), ("rows", (10, 7)), ("all", (16, 24))], indirect=["way"]
)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["glider", "phatgoose", "global", "arrow"])
def test_outputs_and_gradients_equal_the_dense_formula(kind, choice, way, width, dtype):
    case = make_case(width, dtype=dtype)
    router = gd.RouterConfig(kind=kind, temperature=0.7, **ALPHAS, **CHOICES[choice])
    expected = dense(case, lambda query, u: served(token_scores(case, router, query, u), router))
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * pull).sum().backward()

    model, bank = case.attached(dtype)
    gd.set_router(model, router)
    x = case.x.detach().to(dtype).requires_grad_()
    similarity = case.similarity.detach().to(dtype).requires_grad_()
    with gd.query_scores(model, similarity):
        ours = model(x, attention_mask=case.mask)
    assert error(ours, expected) < tolerance(dtype)
    assert ours.dtype == dtype
    (ours * pull.to(dtype)).sum().backward()
    limit = tolerance(dtype) if dtype == torch.float64 else 1e-4
    compare_gradients(case, bank, {"x": x, "similarity": similarity}, limit)


@pytest.mark.parametrize("kind", ["glider", "phatgoose", "arrow"])
def test_bfloat16_stays_close_to_the_formula_in_float64(kind, way):
    case = make_case(dtype=torch.bfloat16)
    router = gd.RouterConfig(kind=kind, top_k=2, **ALPHAS)
    expected = dense(case, lambda query, u: served(token_scores(case, router, query, u), router))
    model, _ = case.attached(torch.bfloat16)
    gd.set_router(model, router)
    with gd.query_scores(model, case.similarity.detach().bfloat16()):
        ours = model(case.x.detach().bfloat16(), attention_mask=case.mask)
    assert ours.dtype == torch.bfloat16
    assert error(ours, expected) < tolerance(torch.bfloat16)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("ranks", [(4,), (1, 4, 0, 8)], ids=["one", "several"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_gate_training_equals_the_formula_with_raw_gates(ranks, gated, dtype, way):
    case = make_case(ranks=ranks, dtype=dtype)
    owner = torch.tensor([3, 0, 1]) % len(ranks)

    def weights(query: int, u: torch.Tensor) -> dict[int, torch.Tensor]:
        e = int(owner[query])
        return {e: (case.gates[e] @ u).sigmoid() if gated else torch.ones((), dtype=torch.float64)}

    expected = dense(case, weights)
    # An expert alone also serves padding, which no loss looks at.
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pull = pull * case.mask[..., None]
    (expected * pull).sum().backward()
    model, bank = case.attached(dtype)
    context = context_of(model)
    context.gated = gated
    gates = context.gates["layer"].requires_grad_()
    x = case.x.detach().to(dtype).requires_grad_()
    with gd.assign_experts(model, owner):
        ours = model(x, attention_mask=case.mask)
    real = case.mask.bool()
    assert error(ours[real], expected[real]) < tolerance(dtype)
    (ours * pull.to(dtype)).sum().backward()
    limit = tolerance(dtype) if dtype == torch.float64 else 1e-4
    compare_gradients(case, bank, {"x": x, "gates": gates}, limit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_merged_equals_the_mean_of_the_deltas(dtype):
    case = make_case(ranks=(1, 4, 0, 8, 3, 5, 2), mask=("111", "111"), dtype=dtype)
    equal = torch.tensor(1 / len(case.loras), dtype=torch.float64)
    expected = dense(case, lambda query, u: dict.fromkeys(range(len(case.loras)), equal))
    model, _ = case.attached(dtype)
    gd.set_router(model, gd.RouterConfig(kind="merged"))
    assert error(model(case.x.detach().to(dtype)), expected) < tolerance(dtype)


@pytest.mark.parametrize("kind", ["phatgoose", "glider", "arrow", "global", "merged"])
def test_a_pool_of_one_expert_equals_plain_lora(kind, way):
    case = make_case(ranks=(4,), mask=("111", "111"))
    one = torch.ones((), dtype=torch.float64)
    expected = dense(case, lambda query, u: {0: one})
    model, _ = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind=kind, top_k=1, **ALPHAS))
    with gd.query_scores(model, case.similarity.detach()):
        assert error(model(case.x.detach()), expected) < 1e-10


def test_prototypes_are_frozen_so_two_backward_passes_in_a_row_work():
    case = make_case()
    for kind in ("arrow", "phatgoose"):
        model, bank = case.attached(torch.float64)
        context_of(model).gates["layer"].requires_grad_()
        gd.set_router(model, gd.RouterConfig(kind=kind))
        model(case.x.detach(), attention_mask=case.mask).sum().backward()
        first = bank.A.grad.clone()
        bank.A.grad = None
        model(case.x.detach(), attention_mask=case.mask).sum().backward()
        assert torch.equal(bank.A.grad, first)


@pytest.mark.parametrize("kind", ["arrow", "phatgoose", "merged"])
def test_a_first_forward_in_inference_mode_does_not_forbid_gradients_later(kind):
    case = make_case()
    model, _ = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind=kind))
    with torch.inference_mode():
        before = model(case.x.detach(), attention_mask=case.mask).clone()
    x = case.x.detach().requires_grad_()
    y = model(x, attention_mask=case.mask)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(y.detach(), before)


# Who serves whom --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["top2", "topp.9"])
def test_an_expert_without_the_layer_never_serves_there(choice, way):
    case = make_case(ranks=(4, 0, 0))
    model, bank = case.attached(torch.float64)
    with torch.no_grad():  # would show if it were used
        bank.A[1:] = 1e3
        bank.B[1:] = 1e3
        bank.scale[1:] = 1.0
        context_of(model).gates["layer"][1:] = case.x[0, 3] * 10
    gd.set_router(model, gd.RouterConfig(kind="phatgoose", **CHOICES[choice]))
    one = torch.ones((), dtype=torch.float64)
    ours = model(case.x.detach(), attention_mask=case.mask)
    assert error(ours, dense(case, lambda query, u: {0: one})) < 1e-10


@pytest.mark.parametrize("choice", ["top1", "top2", "topp.9"])
@pytest.mark.parametrize("kind", ["glider", "global"])
def test_a_similarity_of_minus_infinity_excludes_an_expert_for_that_query_only(kind, choice, way):
    case = make_case(ranks=(4, 4, 4))
    similarity = torch.tensor([[0.9, NEVER, 0.1], [0.9, 0.8, NEVER], [NEVER, NEVER, 0.1]])
    model, bank = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind=kind, alpha_in=1.0, alpha_out=1.0, threshold=0.5, **CHOICES[choice]))
    for query in range(3):
        with gd.query_scores(model, similarity[query : query + 1]):
            alone = model(case.x.detach()[query : query + 1], attention_mask=case.mask[query : query + 1])
        excluded = similarity[query] == NEVER
        with torch.no_grad():
            kept = bank.B.clone()
            bank.B[excluded] = 1e3
            with gd.query_scores(model, similarity[query : query + 1]):
                again = model(case.x.detach()[query : query + 1], attention_mask=case.mask[query : query + 1])
            bank.B.copy_(kept)
        assert torch.equal(alone, again)
        assert not torch.allclose(alone, case.layer(case.x[query : query + 1]))


@pytest.mark.parametrize("choice", ["top2", "topp.9"])
def test_stats_do_not_count_an_expert_that_is_excluded_or_lacks_the_layer(choice, way):
    case = make_case(ranks=(4, 4, 0), mask=("0111", "1111", "1100"))
    similarity = torch.tensor([[0.9, NEVER, 0.1], [0.2, 0.2, NEVER], [NEVER, NEVER, 0.1]])
    model, _ = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind="glider", **ALPHAS, **CHOICES[choice]))
    with gd.query_scores(model, similarity):
        model(case.x, attention_mask=case.mask)
    counts = gd.routing_stats(model)["layer"].tolist()
    assert counts[2] == 0
    if choice == "top2":
        assert counts == [3 + 4, 4, 0]
    else:
        assert counts[0] >= 3


def test_stats_count_a_chosen_expert_even_if_its_weight_underflows():
    case = make_case(ranks=(4, 4), mask=("1111",))
    model, _ = case.attached(torch.float32)
    gd.set_router(model, gd.RouterConfig(kind="glider", alpha_in=1000.0, alpha_out=1000.0, threshold=0.5, top_k=2))
    with gd.query_scores(model, torch.tensor([[0.9, 0.1]])):
        model(case.x.detach().float(), attention_mask=case.mask)
    assert gd.routing_stats(model)["layer"].tolist() == [4, 4]


@pytest.mark.parametrize("choice", ["top1", "top2", "topp.9"])
@pytest.mark.parametrize("kind", ["glider", "global"])
def test_a_query_that_may_use_no_expert_gets_the_base_output_and_finite_gradients(kind, choice, way):
    case = make_case(ranks=(4, 0, 3))
    similarity = torch.tensor([[0.9, 0.1, 0.2], [NEVER, 0.9, NEVER], [NEVER, NEVER, NEVER]]).requires_grad_()
    model, bank = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind=kind, **ALPHAS, **CHOICES[choice]))
    x = case.x.detach().requires_grad_()
    with gd.query_scores(model, similarity):
        y = model(x, attention_mask=case.mask)
    base = case.layer(case.x).detach()
    assert torch.equal(y[1:].detach(), base[1:])
    assert not torch.allclose(y[0, 2:].detach(), base[0, 2:])
    y.sum().backward()
    for name, leaf in {"x": x, "A": bank.A, "B": bank.B, "similarity": similarity}.items():
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all(), name
    assert torch.allclose(x.grad[1:], case.layer.weight.sum(0).expand_as(x.grad[1:]))


def test_alpha_switches_per_query_only_above_the_threshold():
    case = make_case(ranks=(4, 4, 4), mask=("111",) * 3)
    similarity = torch.tensor([[0.5, 0.1, 0.3], [0.5 + 1e-6, 0.1, 0.3], [0.9, 0.1, 0.3]])
    model, _ = case.attached(torch.float64)
    x = case.x.detach()

    def run(alpha_in: float, alpha_out: float) -> torch.Tensor:
        gd.set_router(
            model, gd.RouterConfig(kind="glider", alpha_in=alpha_in, alpha_out=alpha_out, threshold=0.5, top_k=3)
        )
        with gd.query_scores(model, similarity):
            return model(x)

    both, high, low = run(7.0, 0.3), run(7.0, 7.0), run(0.3, 0.3)
    assert torch.equal(both[0], low[0])
    assert torch.equal(both[1:], high[1:])
    assert not torch.allclose(high, low)


def test_alpha_zero_equals_phatgoose():
    case = make_case()
    case.similarity = case.similarity.detach().masked_fill(case.similarity == NEVER, 0.3)
    model, _ = case.attached(torch.float64)
    outputs = []
    for kind in ("glider", "phatgoose"):
        gd.set_router(model, gd.RouterConfig(kind=kind, alpha_in=0.0, alpha_out=0.0, threshold=0.5))
        with gd.query_scores(model, case.similarity):
            outputs.append(model(case.x.detach(), attention_mask=case.mask))
    assert torch.equal(*outputs)


def test_equal_gates_and_a_large_alpha_equal_the_globally_nearest_expert():
    case = make_case(ranks=(4, 4, 4, 4))
    model, _ = case.attached(torch.float64)
    gates = context_of(model).gates["layer"]
    gates.copy_(gates[:1].expand_as(gates).clone())
    gd.set_router(model, gd.RouterConfig(kind="glider", alpha_in=1e4, alpha_out=1e4, threshold=0.5))
    similarity = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.2, 0.1, 0.0, 0.3], [0.3, 0.2, 0.1, 0.0]])
    with gd.query_scores(model, similarity):
        routed = model(case.x.detach(), attention_mask=case.mask)
    with gd.assign_experts(model, similarity.argmax(1)):
        assigned = model(case.x.detach(), attention_mask=case.mask)
    assert torch.allclose(routed, assigned, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["glider", "global"])
def test_a_shortlist_equals_excluding_every_other_expert(kind):
    case = make_case(ranks=(4, 4, 4, 4), mask=("111",) * 3)
    similarity = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.2, 0.1, 0.0, 0.3], [0.3, 0.2, 0.1, 0.0]])
    model, _ = case.attached(torch.float64)
    router = gd.RouterConfig(kind=kind, top_k=3, **ALPHAS)
    gd.set_router(model, replace(router, shortlist=2))
    with gd.query_scores(model, similarity):
        short = model(case.x.detach())
    third = similarity.sort(1).values[:, 1:2]
    gd.set_router(model, router)
    with gd.query_scores(model, similarity.masked_fill(similarity <= third, NEVER)):
        assert torch.allclose(model(case.x.detach()), short, rtol=0, atol=1e-12)
    gd.set_router(model, replace(router, shortlist=99))
    with gd.query_scores(model, similarity):
        wide = model(case.x.detach())
    gd.set_router(model, router)
    with gd.query_scores(model, similarity):
        assert torch.equal(model(case.x.detach()), wide)


# Odd inputs -------------------------------------------------------------------------------------------------


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


def test_a_layer_called_outside_its_model_says_so():
    case = make_case()
    model, _ = case.attached(torch.float64)
    gd.set_router(model, gd.RouterConfig(kind="phatgoose"))
    with pytest.raises(gd.GliderError, match="call the model"):
        model.layer(case.x)


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


# Plans and routes, as properties ----------------------------------------------------------------------------


@st.composite
def routes(draw: Any) -> tuple[Route, int]:
    tokens, experts = draw(st.integers(0, 12)), draw(st.integers(1, 9))
    places = draw(st.integers(1, experts))
    ragged = draw(st.booleans())
    rows = [draw(st.permutations(range(experts)))[:places] for _ in range(tokens)]
    ids = torch.tensor(rows, dtype=torch.int64).view(tokens, places)
    if ragged:
        used = draw(st.lists(st.booleans(), min_size=tokens * places, max_size=tokens * places))
        ids = ids.masked_fill(~torch.tensor(used, dtype=torch.bool).view(tokens, places), -1)
    weights = torch.arange(tokens * places, dtype=torch.float32).view(tokens, places) + 1
    return Route(ids, weights, ragged), experts


@settings(max_examples=100, deadline=None)
@given(routes())
def test_a_plan_holds_every_used_place_once_sorted_by_expert_and_stable(case):
    route, experts = case
    plan = plan_rows(route, experts)
    places = route.expert_ids.shape[1]
    expected = sorted(
        (expert, token, place)
        for token, row in enumerate(route.expert_ids.tolist())
        for place, expert in enumerate(row)
        if expert >= 0
    )
    # The weight tells the place: it was numbered.
    rows = zip(plan.expert.tolist(), plan.token.tolist(), plan.weight.tolist(), strict=True)
    assert [(e, t, int(w) - 1 - t * places) for e, t, w in rows] == expected
    counts = Counter(expert for expert, _, _ in expected)
    assert count_rows(route, experts).tolist() == [counts[e] for e in range(experts)]
    assert plan.ends.tolist() == [sum(counts[i] for i in range(e + 1)) for e in range(experts)]
    assert plan.ends.dtype == torch.int32


@st.composite
def score_rows(draw: Any) -> torch.Tensor:
    tokens, experts = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    value = st.one_of(st.floats(-6, 6, width=32), st.just(NEVER))
    rows = draw(st.lists(st.lists(value, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens))
    return torch.tensor(rows, dtype=torch.float64)


@settings(max_examples=150, deadline=None)
@given(score_rows(), st.floats(0.01, 1.0), st.integers(1, 8))
def test_top_p_keeps_the_smallest_set_that_reaches_p(scores, p, at_most):
    route = top_p_route(scores, p, at_most)
    assert route.ragged
    assert route.expert_ids.shape == (scores.shape[0], min(at_most, scores.shape[1]))
    for row, ids, weights in zip(scores, route.expert_ids, route.weights, strict=True):
        ranked = sorted((float(z) for z in row if z != NEVER), reverse=True)
        total = sum(math.exp(z) for z in ranked)
        above = [sum(math.exp(z) for z in ranked[:i]) / total for i in range(len(ranked))]
        assume(all(abs(mass - p) > 1e-9 for mass in above))
        kept = [z for z, mass in zip(ranked, above, strict=True) if mass < p][:at_most]
        used = ids >= 0
        assert row[ids[used]].tolist() == pytest.approx(kept, abs=1e-12)
        assert len(set(ids[used].tolist())) == len(kept)
        assert not weights[~used].any()
        reference = [math.exp(z) / sum(math.exp(q) for q in kept) for z in kept]
        assert weights[used].tolist() == pytest.approx(reference, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(score_rows(), st.integers(1, 8))
def test_top_k_is_the_softmax_over_all_cut_to_k_and_renormalised(scores, k):
    k = min(k, scores.shape[1])
    route = top_k_route(scores, k)
    assert route.expert_ids.shape == (scores.shape[0], k)
    for row, ids, weights in zip(scores, route.expert_ids, route.weights, strict=True):
        used = (ids >= 0) & (row[ids] != NEVER)
        assert len(set(ids[used].tolist())) == used.sum() == min(k, int((row != NEVER).sum()))
        assert not weights[~used].any()
        if not used.any():
            continue
        cut = row.softmax(0).sort(descending=True).values[:k]
        assert torch.allclose(weights, cut / cut.sum(), rtol=0, atol=1e-12)


# Whole models -----------------------------------------------------------------------------------------------


def batch_of(model: Any, rows: list[list[int]], left: bool) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        starts = [[3, *row[: 2 + i]] for i, row in enumerate(rows)]
        long = max(map(len, starts))
        decoder, decoder_mask = torch.zeros(2, len(rows), long, dtype=torch.int64)
        for i, row in enumerate(starts):
            decoder[i, : len(row)], decoder_mask[i, : len(row)] = torch.tensor(row), 1
        inputs |= {"decoder_input_ids": decoder, "decoder_attention_mask": decoder_mask}
    return inputs


@pytest.fixture(scope="session")
def pool_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., gd.ExpertPool]:
    """A pool of ``experts`` random experts for one of MODELS, made once."""
    made: dict[tuple[str, int], gd.ExpertPool] = {}

    def find(name: str, experts: int = 5) -> gd.ExpertPool:
        if (name, experts) not in made:
            path = tmp_path_factory.mktemp(f"{name}_{experts}")
            made[name, experts] = random_pool(path, MODELS[name](), experts=experts)
        return made[name, experts]

    return find


ROWS = [[5, 9, 77, 130, 41, 200, 8], [60, 61, 5, 9], [250, 33]]
SIMILARITY = torch.tensor([[0.9, 0.1, 0.3, 0.2, 0.4], [0.2, 0.3, 0.25, 0.1, NEVER], [0.0, 0.1, 0.55, 0.8, 0.3]])


def logits_mask(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"].bool()


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
        if "decoder." in site and not reads_encoder(site):
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
    assert any("grouped_mm" in name for name in ops[0]) == (way == "rows")
    assert {name: (ops[0][name], ops[1][name]) for name in ops[0] | ops[1] if ops[0][name] != ops[1][name]} == {}


# Training ---------------------------------------------------------------------------------------------------


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
        job: Any = SimpleNamespace(frozen=SimpleNamespace(model=model), cfg=Config())
        job.cfg.train.gradient_checkpointing = checkpointing
        with _installed(job, "expert", banks, gates, gated=True):
            context = context_of(model)
            context.names = pool.names
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
    frozen, collator = FrozenBase(base, ALONE, 0), Collator(base, 64)
    encoded = [collator.encode("Input: a b c\nOutput:", " x"), collator.encode("Input: d\nOutput:", " long one")]
    results = []
    for checkpointing in (False, True):
        banks, gates = load_banks(base.model, pool, torch.float32, with_gates=True)
        leaves = [tensor.requires_grad_() for bank in banks.values() for tensor in (bank.A, bank.B)]
        if gated:
            leaves = [gate.requires_grad_() for gate in gates.values()]
        job: Any = SimpleNamespace(frozen=frozen, cfg=Config())
        job.cfg.train.gradient_checkpointing = checkpointing
        with _installed(job, "expert", banks, gates, gated=gated):
            nll = Runner(frozen, collator, leaves).train(collator.batch(encoded), 10)
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
