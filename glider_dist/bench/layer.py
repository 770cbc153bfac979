"""``glider-dist bench layer``: a routed layer in one process, against what one would do without it.

Times of inference, k = 2, as ratios of medians of interleaved rounds; on a GPU where there is one, in bfloat16,
else on one thread in fp32:

* ``one``: base linear and one LoRA that serves every token (the floor: no routing at all);
* ``ours``: base linear and the routed experts, scoring included, without what a whole forward does once for all
  its layers (reading the mask);
* ``loop``: the same output by a Python loop over the experts, each on its own tokens (the official layer's way,
  written from the formula);
* ``all``: the same output with every expert computed on every token (PEFT's way in Arrow).

``ours / floor`` takes into the floor that the chosen experts must be read from memory once: ``one`` plus their
bytes over the speed at which a thread, or the GPU, reads memory, measured first.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from glider_dist.parallel.ranks import keep_memory
from glider_dist.routing.local import Inputs, gate_prototypes, gate_scores
from glider_dist.routing.route import Route, top_k_route

EXPERTS, RANK, TOP_K = (8, 32, 166, 1024), 16, 2
ROUNDS = 7


@dataclass(frozen=True)
class _Machine:
    """Where a layer is measured, the sizes that fit it, and how far two ways may differ in this dtype."""

    device: torch.device
    dtype: torch.dtype
    widths: tuple[int, ...]
    tokens: tuple[int, ...]
    tolerance: float

    @property
    def name(self) -> str:
        return "a thread" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    def bytes_a_second(self) -> float:
        """At which it reads its memory."""
        large = torch.ones(1 << (26 if self.device.type == "cpu" else 30), device=self.device)
        return large.nbytes / medians(interleave({"read": large.sum}, 5))["read"]


_CPU = _Machine(torch.device("cpu"), torch.float32, (576, 2048), (64, 2048), 1e-5)
_GPU = _Machine(torch.device("cuda"), torch.bfloat16, (576, 2048, 4096), (64, 2048, 16384), 2e-2)


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
    keep_memory()
    machine = _GPU if torch.cuda.is_available() else _CPU
    speed = machine.bytes_a_second()
    print(f"{machine.name} reads {speed / 1e9:.1f} GB/s")
    rows = []
    for width in machine.widths:
        for tokens in machine.tokens:
            for experts in EXPERTS:
                rows.append(_cell(machine, width, tokens, experts, speed))
                print(table(rows).splitlines()[-1] if len(rows) > 1 else table(rows), flush=True)
    about = {"dtype": str(machine.dtype), "GB/s": speed / 1e9, "rank": RANK, "top_k": TOP_K}
    save(folder, "layer", rows, about)


@torch.inference_mode()
def _cell(machine: _Machine, width: int, tokens: int, experts: int, speed: float) -> dict[str, Any]:
    device, dtype = machine.device, machine.dtype
    draw = torch.Generator(device).manual_seed(0)
    a = (torch.randn(experts, RANK, width, generator=draw, device=device) / width**0.5).to(dtype)
    b = (torch.randn(experts, RANK, width, generator=draw, device=device) / RANK**0.5).to(dtype)
    eligible = torch.ones(experts, dtype=torch.bool, device=device)
    bank = SiteBank(a, b, torch.ones(experts, device=device), eligible)
    gates = torch.randn(experts, width, generator=draw, device=device)
    x = torch.randn(1, tokens, width, generator=draw, device=device).to(dtype)
    model = _Layer(width).to(device, dtype)
    base = model.linear
    context = install(model, tuple(f"expert_{i}" for i in range(experts)), {"linear": bank}, {"linear": gates})
    context.use(RouterConfig(kind="phatgoose", top_k=TOP_K))
    prototypes = gate_prototypes(gates)

    def route() -> Route:
        return top_k_route(gate_scores(Inputs.of(x[0]), prototypes), TOP_K, excludes=False)

    def one() -> torch.Tensor:
        return base(x[0]) + F.linear(F.linear(x[0], a[0]), b[0].t())

    model(inputs_embeds=x)

    def ours() -> torch.Tensor:
        result: torch.Tensor = model.linear(x.view_as(x))[0]  # another tensor, as from another layer
        return result

    def loop() -> torch.Tensor:
        chosen, y = route(), base(x[0])
        for expert in range(experts):
            token, place = (chosen.expert_ids == expert).nonzero(as_tuple=True)
            if len(token):
                out = F.linear(F.linear(x[0, token], a[expert]), b[expert].t())
                y[token] += out * chosen.weights[token, place, None].to(dtype)
        return y

    def every() -> torch.Tensor:
        chosen = route()
        weight = torch.zeros(tokens, experts, device=device).scatter_(1, chosen.expert_ids, chosen.weights)
        h = F.linear(x[0], a.flatten(0, 1)).view(tokens, experts, RANK) * weight[:, :, None].to(dtype)
        return base(x[0]) + h.flatten(1) @ b.flatten(0, 1)

    for other in (loop, every):
        error = float((ours() - other()).norm() / other().norm())
        if not error < machine.tolerance:
            raise GliderError(f"width {width}, {experts} experts: results differ by {error:.1e}; this is a bug")
    variants = {"one": one, "ours": ours, "loop": loop, "all": every, "scoring": route}
    times = medians(interleave(variants, ROUNDS))
    reading = len(route().expert_ids.unique()) * (a[0].nbytes + b[0].nbytes) / speed
    return {
        "width": width,
        "tokens": tokens,
        "experts": experts,
        "one ms": 1e3 * times["one"],
        "ours ms": 1e3 * times["ours"],
        "ours / one": times["ours"] / times["one"],
        "ours / floor": times["ours"] / (times["one"] + reading),
        "of it scoring": times["scoring"] / times["one"],
        "loop / ours": times["loop"] / times["ours"],
        "all / ours": times["all"] / times["ours"],
    }
