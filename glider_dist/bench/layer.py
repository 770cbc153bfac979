"""``glider-dist bench layer``: a routed layer in one process, against what one would do without it.

Times of inference on one thread, fp32, k = 2, as ratios of medians of interleaved rounds:

* ``one``: base linear and one LoRA that serves every token (the floor: no routing at all);
* ``ours``: base linear and the routed experts, scoring included;
* ``loop``: the same output by a Python loop over the experts, each on its own tokens (the official layer's way,
  written from the formula);
* ``all``: the same output with every expert computed on every token (PEFT's way in Arrow).

``ours / floor`` takes into the floor that the chosen experts must be read from memory once: ``one`` plus their
bytes over the speed at which a thread reads memory, measured first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from glider_dist.bench.timing import interleave, medians, save, table
from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.lora.bank import SiteBank
from glider_dist.model.attach import install
from glider_dist.routing.local import Inputs, gate_prototypes, gate_scores
from glider_dist.routing.route import Route, top_k_route

WIDTHS, EXPERTS, TOKENS, RANK, TOP_K = (576, 2048), (8, 32, 166, 1024), (64, 2048), 16, 2
ROUNDS = 7


class _Layer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(inputs_embeds)
        return result


def run(folder: Path) -> None:
    """Measure, print the table, and write ``bench_layer.json``.

    Raises:
        GliderError: the variants disagree, which would be a bug.
    """
    torch.set_num_threads(1)
    speed = _bytes_a_second()
    print(f"a thread reads {speed / 1e9:.1f} GB/s")
    rows = []
    for width in WIDTHS:
        for tokens in TOKENS:
            for experts in EXPERTS:
                rows.append(_cell(width, tokens, experts, speed))
                print(table(rows).splitlines()[-1] if len(rows) > 1 else table(rows), flush=True)
    save(
        folder / "bench_layer.json",
        "layer",
        rows,
        {"torch": torch.__version__, "rank": RANK, "top_k": TOP_K, "GB/s": speed / 1e9},
    )


def _bytes_a_second() -> float:
    large = torch.ones(1 << 26)
    return large.nbytes / medians(interleave({"read": large.sum}, 5))["read"]


@torch.inference_mode()
def _cell(width: int, tokens: int, experts: int, speed: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(experts, RANK, width, generator=generator) / width**0.5
    b = torch.randn(experts, RANK, width, generator=generator) / RANK**0.5
    bank = SiteBank(a, b, torch.ones(experts), torch.ones(experts, dtype=torch.bool))
    gates = torch.randn(experts, width, generator=generator)
    x = torch.randn(1, tokens, width, generator=generator)
    model = _Layer(width)
    base = model.linear
    context = install(model, tuple(f"expert_{i}" for i in range(experts)), {"linear": bank}, {"linear": gates})
    context.use(RouterConfig(kind="phatgoose", top_k=TOP_K))
    prototypes = gate_prototypes(gates)

    def route() -> Route:
        return top_k_route(gate_scores(Inputs.of(x[0]), prototypes), TOP_K, excludes=False)

    def one() -> torch.Tensor:
        return base(x[0]) + F.linear(F.linear(x[0], a[0]), b[0].t())

    def ours() -> torch.Tensor:
        return model(inputs_embeds=x)[0]

    def loop() -> torch.Tensor:
        chosen, y = route(), base(x[0])
        for expert in range(experts):
            token, place = (chosen.expert_ids == expert).nonzero(as_tuple=True)
            if len(token):
                out = F.linear(F.linear(x[0, token], a[expert]), b[expert].t())
                y[token] += out * chosen.weights[token, place, None]
        return y

    def every() -> torch.Tensor:
        chosen = route()
        weight = torch.zeros(tokens, experts).scatter_(1, chosen.expert_ids, chosen.weights)
        h = F.linear(x[0], a.flatten(0, 1)).view(tokens, experts, RANK) * weight[:, :, None]
        return base(x[0]) + h.flatten(1) @ b.flatten(0, 1)

    for other in (loop, every):
        error = float((ours() - other()).norm() / other().norm())
        if not error < 1e-5:
            raise GliderError(f"width {width}, {experts} experts: results differ by {error:.1e}; this is a bug")
    variants = {"one": one, "ours": ours, "loop": loop, "all": every, "scoring": route}
    times = medians(interleave(variants, ROUNDS))
    reading = len(route().expert_ids.unique()) * (a[0].nbytes + b[0].nbytes) / speed
    return {
        "width": width,
        "tokens": tokens,
        "experts": experts,
        "one ms": 1e3 * times["one"],
        "ours / one": times["ours"] / times["one"],
        "ours / floor": times["ours"] / (times["one"] + reading),
        "of it scoring": times["scoring"] / times["one"],
        "loop / ours": times["loop"] / times["ours"],
        "all / ours": times["all"] / times["ours"],
    }
