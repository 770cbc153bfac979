"""Work that the expert-parallel tests run on every rank: a whole model, compared with one that has all experts."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from rank_cases import mesh_of, relative_error, sum_over_replicas
from routed_models import ALPHAS, CAUSAL, MODELS

import glider_dist as gd
from glider_dist.model.attach import context_of
from glider_dist.model.recompute import recomputed
from glider_dist.parallel.exchange import Traffic, count_traffic
from glider_dist.parallel.placement import Placement, balanced

EXPERTS = 5
ROUTERS = {
    "glider": gd.RouterConfig(**ALPHAS),
    "topp": gd.RouterConfig(top_p=0.7, **ALPHAS),
    "phatgoose": gd.RouterConfig(kind="phatgoose", top_k=3),
    "global": gd.RouterConfig(kind="global", top_k=1, **ALPHAS),
    "shortlist": gd.RouterConfig(shortlist=3, **ALPHAS),
    "arrow": gd.RouterConfig(kind="arrow"),
    "listed arrow": gd.RouterConfig(local="arrow", shortlist=2, **ALPHAS),
    "arrow shortlist": gd.RouterConfig(kind="arrow", shortlist=1),
    "glider arrow": gd.RouterConfig(local="arrow", **ALPHAS),
    "oracle": gd.RouterConfig(kind="oracle"),
    "base": gd.RouterConfig(kind="base", shortlist=2),
}


@dataclass(frozen=True)
class Run:
    """One comparison: a model, a router, and each rank's own batch."""

    model: str
    router: str = "glider"
    dispatch: str = "auto"
    parts: int = 2
    padding: str = "right"
    empty: tuple[int, ...] = ()
    """Ranks whose batch is all padding."""
    train: bool = True
    gated: bool = False
    checkpointing: bool = False
    placement: str = "contiguous"
    cache_bytes: int = 1 << 30
    forwards: int = 2
    experts: int = EXPERTS
    dtype: torch.dtype = torch.float64


@dataclass
class Found:
    """Largest relative errors by name, what each forward cost, and the groups of sites found."""

    errors: dict[str, float] = field(default_factory=dict)
    traffic: list[Traffic] = field(default_factory=list)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sites: int = 0
    nbytes: int = 0
    chosen: dict[str, int] = field(default_factory=dict)

    def note(self, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        error = relative_error(ours, theirs)
        self.errors[name] = max(self.errors.get(name, 0.0), error)


@cache
def model_of(name: str, which: int, dtype: torch.dtype) -> Any:
    """A model for each side of the comparison."""
    return MODELS[name]().to(dtype)


def batch_of(run: Run, rank: int) -> dict[str, torch.Tensor]:
    """Other sizes on every rank; some padding in each."""
    generator = torch.Generator().manual_seed(17 + rank)
    rows, length = 2 + rank % 3, 6 + 2 * rank
    ids = torch.randint(4, 250, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        pad = row % 3 if rank not in run.empty else length
        real = slice(pad, length) if run.padding == "left" else slice(0, length - pad)
        mask[row] = 0
        mask[row, real] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if run.model not in CAUSAL:
        batch["decoder_input_ids"] = torch.randint(4, 250, (rows, 4 + rank), generator=generator)
        if rank in run.empty:
            batch["decoder_attention_mask"] = torch.zeros_like(batch["decoder_input_ids"])
    return batch


def scope(model: Any, run: Run, rank: int, rows: int) -> contextlib.AbstractContextManager[Any]:
    generator = torch.Generator().manual_seed(5 + rank)
    similarity = torch.rand(rows, run.experts, generator=generator, dtype=run.dtype)
    owners = torch.randint(0, run.experts, (rows,), generator=generator)
    if ROUTERS[run.router].kind == "oracle":
        return gd.assign_experts(model, owners)
    return gd.query_scores(model, similarity)


def forward(model: Any, run: Run, rank: int, keep: list[torch.Tensor] | None = None) -> torch.Tensor:
    """The logits of real tokens; ``keep`` is given the embeddings, of which gradients may be asked."""
    batch = batch_of(run, rank)
    real = batch["attention_mask"] if run.model in CAUSAL else batch.get("decoder_attention_mask")
    inputs = dict(batch)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    if keep is not None:
        embedded.requires_grad_()
        keep.append(embedded)
    # What a block appends to a cache it would append again when it is recomputed.
    logits = model(**inputs, inputs_embeds=embedded, use_cache=not run.checkpointing).logits
    return logits.flatten(0, 1) if real is None else logits[real.bool()]


def loss_of(logits: torch.Tensor, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(99 + rank)
    return (logits * torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)).sum()


@contextlib.contextmanager
def attached(model: Any, pool: gd.ExpertPool, run: Run, mesh: gd.Mesh | None) -> Iterator[Any]:
    place: Placement | None = None
    if run.placement == "balanced" and mesh is not None:
        place = balanced(pool.names, mesh.expert_parallel, {name: 1.0 * i for i, name in enumerate(pool.names)})
    gd.attach_pool(
        model, pool, ROUTERS[run.router], mesh, run.dispatch if mesh is not None else "auto", run.dtype, place,
        cache_bytes=run.cache_bytes,
    )  # fmt: skip
    context = context_of(model)
    context.gated = run.gated
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for bank in context.banks.values():
        bank.A.requires_grad_(run.train)
        bank.B.requires_grad_(run.train)
    for gate in context.gates.values():
        gate.requires_grad_(run.gated)
    try:
        yield context
    finally:
        gd.detach(model)


def compare(run: Run, path: str) -> Found:
    """This rank's logits, statistics and gradients against a single process with every rank's batch."""
    mesh = mesh_of(run.parts)
    world, rank = mesh.expert_parallel * mesh.data_parallel, mesh.rank
    pool = gd.ExpertPool.open(path)
    found = Found()
    blocks = recomputed if run.checkpointing else contextlib.nullcontext
    whole, part = model_of(run.model, 0, run.dtype), model_of(run.model, 1, run.dtype)
    with attached(whole, pool, run, None) as all_experts, attached(part, pool, run, mesh) as own:
        for other in range(world):
            kept: list[torch.Tensor] = []
            with contextlib.ExitStack() as stack:
                stack.enter_context(scope(whole, run, other, len(batch_of(run, other)["input_ids"])))
                stack.enter_context(blocks(whole))
                gd.reset_routing_stats(whole)
                logits = forward(whole, run, other, kept)
                if logits.requires_grad:
                    loss_of(logits, other).backward()
            if other == rank:
                wanted, wanted_x, wanted_stats = logits.detach(), kept[0].grad, gd.routing_stats(whole)
        rows = len(batch_of(run, rank)["input_ids"])
        with blocks(part):
            for _ in range(run.forwards):
                for bank in own.banks.values():
                    bank.A.grad = bank.B.grad = None
                for gate in own.gates.values():
                    gate.grad = None
                kept = []
                gd.reset_routing_stats(part)
                with scope(part, run, rank, rows):
                    with count_traffic() as traffic:
                        logits = forward(part, run, rank, kept)
                    if logits.requires_grad:
                        loss_of(logits, rank).backward()
                found.traffic.append(traffic)
                found.note("logits", logits.detach(), wanted)
                for site, counts in gd.routing_stats(part).items():
                    assert torch.equal(counts, wanted_stats[site]), site
                assert gd.routing_stats(part).keys() == wanted_stats.keys()
                if rank not in run.empty and logits.requires_grad:
                    found.note("x", kept[0].grad, wanted_x)
                if run.train and ROUTERS[run.router].kind != "base":
                    owned = range(run.experts)
                    if own.dispatch is not None:
                        owned = own.dispatch.placement.owned(mesh.expert_rank)
                    for site, bank in own.banks.items():
                        reference = all_experts.banks[site]
                        if reference.A.grad is None:  # BERT's pooler, whose output nobody reads
                            continue
                        for ours, theirs in ((bank.A, reference.A), (bank.B, reference.B)):
                            found.note("experts", sum_over_replicas(mesh, ours.grad), theirs.grad[list(owned)])
                if run.gated:
                    for site, gate in own.gates.items():
                        if all_experts.gates[site].grad is None:
                            continue
                        grad = torch.zeros_like(gate) if gate.grad is None else gate.grad.clone()
                        torch.distributed.all_reduce(grad)
                        found.note("gates", grad, all_experts.gates[site].grad)
        if own.dispatch is not None:
            found.chosen = own.dispatch.chosen
        own.shared.finish()
        found.groups, found.sites = dict(own.shared.groups), len(own.banks)
        found.nbytes = sum(bank.nbytes() for bank in own.banks.values())
    return found


def compare_all(runs: list[Run], path: str) -> list[Found]:
    return [compare(run, path) for run in runs]


def alternate(run: Run, path: str) -> Found:
    """The same where each forward of each group takes another strategy than the last ones."""
    ways = itertools.cycle(["all_to_all", "gather", "gather"])
    with patch("glider_dist.parallel.dispatch.Dispatch._cheaper", lambda *_: next(ways)):
        return compare(run, path)


def evaluate_between_steps(path: str, dispatch: str) -> tuple[float, float]:
    """Errors of forwards without gradients before and after the experts' weights change, while they may train."""
    run = Run("llama", "glider", dispatch)
    mesh, pool = mesh_of(2), gd.ExpertPool.open(path)
    whole, part = model_of("llama", 0, run.dtype), model_of("llama", 1, run.dtype)
    rows = len(batch_of(run, mesh.rank)["input_ids"])
    errors = []
    with attached(whole, pool, run, None) as all_experts, attached(part, pool, run, mesh) as own, torch.no_grad():
        for _ in range(2):
            logits = []
            for model in (whole, part):
                with scope(model, run, mesh.rank, rows):
                    logits += [forward(model, run, mesh.rank), forward(model, run, mesh.rank)]
            errors.append(max(relative_error(logits[2], logits[0]), relative_error(logits[3], logits[1])))
            for context in (all_experts, own):
                for bank in context.banks.values():
                    bank.B.mul_(1.5)
    return errors[0], errors[1]


def train_after_inference(path: str) -> float:
    """Gates train through experts that were fetched, frozen, under inference mode."""
    run = Run("llama", "oracle", "gather", train=False)
    mesh, pool = mesh_of(2), gd.ExpertPool.open(path)
    whole, part = model_of("llama", 0, run.dtype), model_of("llama", 1, run.dtype)
    rows = len(batch_of(run, mesh.rank)["input_ids"])
    grads: list[list[torch.Tensor]] = [[], []]
    for kept, model, own_mesh in zip(grads, (whole, part), (None, mesh), strict=True):
        with attached(model, pool, run, own_mesh), scope(model, run, mesh.rank, rows):
            with torch.inference_mode():
                forward(model, run, mesh.rank)
            loss_of(forward(model, run, mesh.rank, kept), mesh.rank).backward()
    return relative_error(grads[1][0].grad, grads[0][0].grad)


# Generation -------------------------------------------------------------------------------------------------
