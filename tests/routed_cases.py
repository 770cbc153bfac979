"""Cases for the tests of the routed layer, and the plain formula as loops over tokens and experts in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import routed_models
import torch
import torch.nn.functional as F
from routed_models import NEVER
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
)

import glider_dist as gd
from glider_dist.lora.bank import SiteBank, stack_site
from glider_dist.model.attach import install
from glider_dist.pool import SiteLora

SMALL = {"layers": 2, "ffn_dim": 80, "attention_heads": 4}


def tiny_bart() -> Any:
    """Its blocks apply dropout themselves, as T5's do not."""
    size = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in SMALL.items()}
    config = BartConfig(vocab_size=256, max_position_embeddings=64, d_model=48, init_std=0.15, **size)
    torch.manual_seed(0)
    return BartForConditionalGeneration(config).eval()


MODELS: dict[str, Callable[[], Any]] = {**routed_models.MODELS, "bart": tiny_bart}
# With absolute positions, padding on the left moves the tokens.
ABSOLUTE = {("bert", True), ("bart", True)}
CHOICES: dict[str, dict[str, Any]] = {
    "top1": {"top_k": 1},
    "top2": {"top_k": 2},
    "top3": {"top_k": 3},
    "topp.25": {"top_p": 0.25},
    "topp.5": {"top_p": 0.5},
    "topp.9": {"top_p": 0.9},
    "topp.9max2": {"top_p": 0.9, "top_p_max": 2},
}


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
        if lora is None or case.similarity[query, e] == NEVER:
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


ROWS = [[5, 9, 77, 130, 41, 200, 8], [60, 61, 5, 9], [250, 33]]
SIMILARITY = torch.tensor([[0.9, 0.1, 0.3, 0.2, 0.4], [0.2, 0.3, 0.25, 0.1, NEVER], [0.0, 0.1, 0.55, 0.8, 0.3]])


def logits_mask(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"].bool()
