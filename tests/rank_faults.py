"""What goes wrong on one rank, and the parity fixtures, as work for the expert-parallel tests."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from rank_cases import Case, mesh_of, run_case
from rank_models import MODELS, ROUTERS, Run, attached, forward, loss_of, model_of
from test_parity import FIXTURES, error, load, router_for
from test_parity import forward as parity_forward

import glider_dist as gd
from glider_dist.lora.bank import SiteBank
from glider_dist.parallel.dispatch import Dispatch
from glider_dist.parallel.guards import check_gradients, check_replicas
from glider_dist.parallel.placement import Placement, contiguous
from glider_dist.routing.route import Route


def message_of(work: object, *args: object, **kwargs: object) -> str:
    """The sentence with which it stops, or nothing."""
    assert callable(work)
    try:
        work(*args, **kwargs)
    except gd.GliderError as failure:
        return str(failure)
    return ""


def attach_differently(paths: list[str], owners: list[list[int]] | None, parts: int) -> str:
    """Each rank attaches its own pool, with its own placement."""
    mesh = mesh_of(parts)
    pool = gd.ExpertPool.open(paths[mesh.rank])
    placement = None if owners is None else Placement(pool.names, tuple(owners[mesh.rank]), parts)
    model = MODELS["llama"]()
    said = message_of(gd.attach_pool, model, pool, ROUTERS["phatgoose"], mesh, "all_to_all", placement=placement)
    model(input_ids=torch.tensor([[5, 6, 7]])) if not said else None
    return said


def differing_replica(path: str) -> tuple[str, str]:
    """What the guard says before and after a value changes on one rank."""
    run = Run("llama", "phatgoose", "gather", 2, train=False)
    mesh = mesh_of(2)
    with attached(model_of("llama", 1, run.dtype), gd.ExpertPool.open(path), run, mesh) as context:
        placement, banks = context.dispatch.placement, context.banks
        before = message_of(check_replicas, mesh, placement, banks)
        if mesh.rank == 3:  # holds the second half: expert_3 and expert_4
            banks["model.layers.1.mlp.down_proj"].A[1, 2, 3] += 1e-3
        return before, message_of(check_replicas, mesh, placement, banks)


def gradients(path: str, fault: str, unread: int = 0) -> str:
    """A real step, then the guard; ``fault`` is done to one expert's gradient first."""
    run = Run("llama", "oracle", "all_to_all", 2)
    mesh = mesh_of(2)
    model = model_of("llama", 1, run.dtype)
    with attached(model, gd.ExpertPool.open(path), run, mesh) as context:
        gd.reset_routing_stats(model)
        # Nobody asks for the last expert.
        with gd.assign_experts(model, torch.tensor([mesh.rank, 2, 3, 0][: 2 + mesh.rank % 3])):
            loss_of(forward(model, run, mesh.rank), mesh.rank).backward()
        owned = context.dispatch.placement.owned(mesh.expert_rank)
        served = {}
        for site, counts in context.counts.items():
            total = counts.clone()
            dist.all_reduce(total)
            served[site] = total[owned]
        bank = context.banks["model.layers.0.self_attn.v_proj"]
        if fault == "lost":
            bank.B.grad[0] = 0.0
        elif fault == "stray":
            bank.B.grad[-1] = 1.0
        names = tuple(context.names[expert] for expert in owned)
        found = {site: bank.B.grad for site, bank in context.banks.items()}
        return message_of(check_gradients, names, found, served, unread)


def broken_file(path: str) -> str:
    """One expert's file is damaged: only the rank that owns it reads it."""
    mesh = mesh_of(2)
    pool = gd.ExpertPool.open(path)
    return message_of(gd.attach_pool, MODELS["llama"](), pool, ROUTERS["phatgoose"], mesh, "all_to_all")


def leaves(rank: int, how: str) -> None:
    """Exchanges until one rank ends or stops."""
    case = Case(tokens=30)
    run_case(case, "all_to_all", dist.get_world_size())
    if dist.get_rank() == rank:
        if how == "dies":
            os._exit(7)
        time.sleep(600)
    run_case(case, "all_to_all", dist.get_world_size())


def leaves_in_backward(rank: int) -> None:
    """One rank ends after its forward, before its gradients have gone out."""
    x = torch.randn(5, 24)
    routes = [Route(torch.tensor([[0, 1]] * 5), torch.ones(5, 2, requires_grad=True))]
    banks = [SiteBank(torch.randn(1, 8, 24), torch.randn(1, 8, 16), torch.ones(1), torch.ones(1).bool())]
    mesh = mesh_of(2)
    dispatch = Dispatch(mesh, contiguous(["a", "b"], 2), "all_to_all", {"q": torch.ones(2)}, x.device)
    (out,) = dispatch(x, ["q"], routes, banks)
    if dist.get_rank() == rank:
        os._exit(7)
    out.sum().backward()


def parity(path: str, name: str, parts: int, dispatch: str) -> list[tuple[str, float, float]]:
    """Each mode's relative error on this rank's rows, and tokens routed otherwise over all ranks together."""
    assert name in FIXTURES
    mesh = mesh_of(parts)
    world = mesh.expert_parallel * mesh.data_parallel
    _, model, inputs, expected, meta = load(name)
    gd.attach_pool(model, gd.ExpertPool.open(path), gd.RouterConfig(kind="phatgoose"), mesh, dispatch)
    modes = sorted({key.rsplit(".", 1)[0] for key in expected} - {"base"})
    rows = torch.arange(mesh.rank, len(inputs["input_ids"]), world)
    part = {key: value[rows] for key, value in inputs.items()}
    found = []
    for mode in (mode for mode in modes if not mode.startswith("single")):
        gd.set_router(model, router_for(mode))
        gd.reset_routing_stats(model)
        with gd.query_scores(model, part["global_similarity"]):
            logits = parity_forward(model, part)
        stats = gd.routing_stats(model)
        counts = torch.stack([stats[site] for site in meta["sites"]])
        dist.all_reduce(counts)
        moved = (counts - expected[f"{mode}.counts"]).abs().sum().item() / 2
        found.append((mode, error(logits, expected[f"{mode}.logits"][rows], part), moved))
    return found


def rank_of() -> int:
    return dist.get_rank()
