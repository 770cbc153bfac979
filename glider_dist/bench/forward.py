"""``glider-dist bench forward``: whole forwards and generation of a routed model, against its base alone.

Random weights of a Llama's shape, random experts of rank 16 on every linear layer, top-2. On a GPU the shapes of
SmolLM2-135M and of Llama-8B in bfloat16, else the first alone and fewer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from glider_dist.bench.timing import interleave, medians, save, table
from glider_dist.config import RouterConfig
from glider_dist.lora.bank import SiteBank
from glider_dist.model.attach import detach, install, query_scores
from glider_dist.model.sites import linear_sites

RANK, ROUNDS = 16, 3
BASE, ROUTERS = "base", ("phatgoose", "glider")


@dataclass(frozen=True)
class Shape:
    """A Llama by its sizes, and the numbers of experts to measure it with."""

    name: str
    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    experts: tuple[int, ...]

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.width, intermediate_size=self.ffn, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, vocab_size=self.vocabulary,
        )  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A forward of ``rows`` prompts, or their generation of so many ``new`` tokens."""

    rows: int
    length: int
    new: int = 0

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.length}" + (f" + {self.new}" if self.new else "")


SMALL = Shape("135M", 576, 1536, 30, 9, 3, 49152, (12, 64))
LARGE = Shape("8B", 4096, 14336, 32, 32, 8, 32000, (64,))
ON_A_CPU = (Work(4, 64), Work(8, 16, new=8))
ON_A_GPU = (Work(64, 128), Work(8, 1024), Work(64, 16, new=32), Work(1, 16, new=32))


def run(folder: Path, shapes: tuple[Shape, ...] | None = None) -> None:
    """Print the table, and write ``bench_forward.json``."""
    gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
    rows: list[dict[str, Any]] = []
    for shape in shapes or ((SMALL, LARGE) if gpu else (SMALL,)):
        with device:
            made: Any = LlamaForCausalLM(shape.config())
        model = made.to(dtype).eval().requires_grad_(False)
        for experts in shape.experts:
            for work in ON_A_GPU if gpu else ON_A_CPU:
                rows.append({"base": shape.name, "experts": experts, **_measure(model, experts, work)})
                print(table(rows).splitlines()[-1] if len(rows) > 1 else table(rows), flush=True)
        del model, made
    save(folder, "forward", rows, {"dtype": str(dtype), "rank": RANK})


@torch.no_grad()
def _measure(model: Any, experts: int, work: Work) -> dict[str, Any]:
    banks, gates = {}, {}
    draw = torch.Generator(model.device).manual_seed(0)
    for name, site in linear_sites(model).items():
        out, width = site.shape

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw, device=model.device)

        a, b = drawn(experts, RANK, width) / width**0.5, drawn(experts, RANK, out) / 10
        every = torch.ones(experts, device=model.device)
        banks[name] = SiteBank(a.to(model.dtype), b.to(model.dtype), every, every.bool())
        gates[name] = drawn(experts, width)
    ids = torch.randint(4, model.config.vocab_size, (work.rows, work.length), generator=draw, device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    context = install(model, tuple(f"expert_{i}" for i in range(experts)), banks, gates)
    similarity = torch.rand(work.rows, experts)

    def answer(kind: str) -> Callable[[], Any]:
        def way() -> Any:
            context.use(RouterConfig(kind=kind, top_k=2, alpha_in=20.0, alpha_out=3.0, threshold=0.5))
            with query_scores(model, similarity):
                if not work.new:
                    return model(**inputs, use_cache=False, logits_to_keep=1)
                length = {"max_new_tokens": work.new, "min_new_tokens": work.new}
                return model.generate(**inputs, **length, do_sample=False, pad_token_id=0)

        return way

    times = medians(interleave({kind: answer(kind) for kind in (BASE, *ROUTERS)}, ROUNDS))
    detach(model)
    ratios = {f"{kind} / base": times[kind] / times[BASE] for kind in ROUTERS}
    return {"work": work.name, "base ms": 1e3 * times[BASE], **ratios}
