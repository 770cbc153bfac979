"""Work that the expert-parallel tests run on every rank: generation, and forwards under a shortlist."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from rank_cases import mesh_of, relative_error
from rank_models import EXPERTS, Run, attached, batch_of, forward, model_of, scope
from routed_models import CAUSAL

import glider_dist as gd
from glider_dist.model.attach import context_of
from glider_dist.parallel.exchange import Traffic, count_traffic


def prompts_of(name: str, rank: int, rows: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts (right-padded for an encoder), of another length on each rank."""
    generator = torch.Generator().manual_seed(31 + rank)
    length = 4 + 3 * rank
    ids = torch.randint(4, 250, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        pad = row % 3
        real = slice(0, pad) if name in CAUSAL else slice(length - pad, length)
        mask[row, real] = 0
        ids[row, real] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _note(calls: list[int], *_: object) -> None:
    calls.append(1)


def generate_all(
    name: str, path: str, parts: int, counts: list[int], router: str, settings: dict[str, Any], dispatch: str
) -> tuple[list[list[int]], list[list[int]], bool, Traffic, int]:
    """What this rank generates, what one process does, whether the statistics agree, the traffic, forwards."""
    run = Run(name, router, dispatch, parts, train=False)
    mesh = mesh_of(parts)
    rank, pool = mesh.rank, gd.ExpertPool.open(path)
    whole, part = model_of(name, 0, run.dtype), model_of(name, 1, run.dtype)
    # Ranks also stop after other numbers of tokens.
    settings = {"max_new_tokens": 3 + 4 * rank, "do_sample": False, **settings}
    inputs = prompts_of(name, rank, counts[rank])
    found, stats, traffic, forwards = [], [], Traffic(), 0
    for model, own_mesh in ((whole, None), (part, mesh)):
        with attached(model, pool, run, own_mesh), torch.no_grad():
            gd.reset_routing_stats(model)
            if own_mesh is None and not counts[rank]:
                found.append([])
                stats.append({})
                continue
            calls: list[int] = []
            handle = model.register_forward_pre_hook(partial(_note, calls))
            with count_traffic() as traffic, scope(model, run, rank, counts[rank]):
                made = gd.generate(model, **inputs, **settings)
            handle.remove()
            forwards = len(calls)
            made = made if isinstance(made, torch.Tensor) else made.sequences
            assert made.shape[0] == counts[rank] * settings.get("num_return_sequences", 1)
            found.append(made.tolist())
            stats.append({site: count for site, count in gd.routing_stats(model).items() if count.any()})
    same = stats[0].keys() == stats[1].keys() and all(torch.equal(stats[0][s], stats[1][s]) for s in stats[0])
    return found[1], found[0], same, traffic, forwards


def shortlisted(
    name: str, router: str, path: str, parts: int, dispatch: str, never: bool, cache_bytes: int = 1 << 30
) -> tuple[float, list[Traffic], int]:
    """The largest error, the traffic of entering the scores and of each of two forwards inside, and the bytes that
    the cache of experts holds then.

    Args:
        never: the first rank's queries may use no expert at all.
    """
    run = Run(name, router, dispatch, parts, train=False, cache_bytes=cache_bytes)
    mesh = mesh_of(parts)
    pool = gd.ExpertPool.open(path)
    batch = batch_of(run, mesh.rank)
    generator = torch.Generator().manual_seed(3 + mesh.rank)
    similarity = torch.rand(len(batch["input_ids"]), EXPERTS, generator=generator, dtype=run.dtype)
    if never and mesh.rank == 0:
        similarity.fill_(float("-inf"))
    found, costs, held = [], [], 0
    for which, own_mesh in enumerate((None, mesh)):
        model = model_of(name, which, run.dtype)
        costs = [Traffic()]
        with attached(model, pool, run, own_mesh), torch.no_grad(), contextlib.ExitStack() as stack:
            dispatched = context_of(model).dispatch
            with count_traffic() as costs[0]:
                stack.enter_context(gd.query_scores(model, similarity))
            logits = []
            for _ in range(2):
                with count_traffic() as each:
                    logits.append(forward(model, run, mesh.rank))
                costs.append(each)
            held = 0 if dispatched is None else dispatched.cache.nbytes
        found.append(torch.stack(logits))
    return relative_error(found[1], found[0]), costs, held
