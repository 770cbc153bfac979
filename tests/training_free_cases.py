"""What the tests of routers without training share: tiny models, and one layer with its formulas in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from routed_cases import OneLayer
from routed_models import NEVER
from torch import nn

import glider_dist as gd
from glider_dist.lora.bank import stack_site
from glider_dist.model.attach import install
from glider_dist.pool import SiteLora
from glider_dist.testing import tiny_causal, tiny_seq2seq

MODELS: dict[str, Callable[[], Any]] = {"llama": tiny_causal, "t5": tiny_seq2seq}
IDS = torch.tensor([[5, 9, 77, 130, 41, 200, 8], [60, 61, 5, 9, 250, 33, 7]])


def logits_of(model: Any) -> torch.Tensor:
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :4]
    with torch.no_grad():
        return model(**inputs).logits


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


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
        there = [e for e, lora in enumerate(self.loras) if lora is not None]
        bias = {e: 0.0 for e in there if self.similarity[query, e] != NEVER}
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
