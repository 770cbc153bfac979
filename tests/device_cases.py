"""The same work on the CPU and on another device, within processes of their own: the stand-in (test_standin.py) or
a GPU (test_gpu.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cotraining_worker
import pytest
import rank_cases
import torch
from rank_cases import Case
from routed_models import ALPHAS, MODELS

import glider_dist as gd
from glider_dist.evaluation.choices import rank_choices
from glider_dist.evaluation.queries import Query, QueryRunner
from glider_dist.lora.bank import SiteBank
from glider_dist.model.base import BaseModel
from glider_dist.model.batch import Collator
from glider_dist.model.engine import FrozenBase
from glider_dist.parallel.cost import Costs
from glider_dist.parallel.dispatch import Dispatch
from glider_dist.parallel.exchange import count_traffic
from glider_dist.parallel.local_ranks import joined_ranks
from glider_dist.parallel.mesh import init_mesh
from glider_dist.routing.route import Route
from glider_dist.tasks.prompt import answer
from glider_dist.tasks.task import Example, Task
from glider_dist.testing import tiny_tokenizer

CPU = torch.device("cpu")
LENGTHS = (9, 5, 7)
ROUTERS = {
    "glider": {},
    "top-p": {"top_p": 0.5},
    "shortlist": {"shortlist": 3},
    "phatgoose": {"kind": "phatgoose"},
    "global": {"kind": "global"},
    "arrow": {"kind": "arrow"},
    "arrow_general": {"kind": "arrow", "general": ("expert_0",)},
    "lag": {"kind": "lag"},
    "merged": {"kind": "merged"},
    "ties": {"kind": "ties"},
}
# The real tokens of a forward are counted once for each stack that reads a mask.
MASK = "model.tokens.find_tokens"


@dataclass(frozen=True)
class Both:
    """What the CPU and the device made of the same work, where the host waited for the device, and how many
    kernels this package launched there (counted on the stand-in alone)."""

    cpu: list[torch.Tensor]
    far: list[torch.Tensor]
    waits: Counter[str]
    kernels: int = 0

    @property
    def error(self) -> float:
        """The largest difference, relative to the largest number; NaN if any number is."""
        pairs = [(a, b) for a, b in zip(self.cpu, self.far, strict=True) if a.numel()]
        errors = [(a - b).abs().max() / a.abs().max().clamp_min(1e-9) for a, b in pairs]
        return float(torch.stack([error.double() for error in errors]).max())

    @property
    def ours(self) -> dict[str, int]:
        """Waits of this package, by the function that made them."""
        return {name.removeprefix("glider_dist."): n for name, n in self.waits.items() if "glider_dist" in name}


def _far_device(where: str) -> tuple[torch.device, AbstractContextManager[Any]]:
    """The device, and what computes on it and counts waits. Each is imported only where it is used:
    on a GPU a backward fails where PyTorch knows the stand-in."""
    if where == "standin":
        from standin import DEVICE, stand_in

        return DEVICE, stand_in()
    from gpu_waits import on_a_gpu

    return torch.device("cuda", 0), on_a_gpu()


def on_both(where: str, work: Callable[[torch.device, Any], list[torch.Tensor]]) -> Both:
    """``where`` is ``standin`` or ``gpu``; ``work`` is to clear what it does not want counted."""
    device, counted = _far_device(where)
    with counted as mode:
        cpu = work(CPU, mode)
        mode.clear()
        far = work(device, mode)
        waits = Counter(mode.waits)
        kernels = sum(count for name, count in mode.kernels.items() if name.startswith("glider_dist"))
        return Both([one.detach() for one in cpu], [one.detach().cpu() for one in far], waits, kernels)


def serve(
    where: str, name: str, pool: Path, router: dict[str, Any], dispatch: str | None = None, generate: bool = False
) -> Both:
    """A second forward of a routed model (the first one makes the prototypes), or a generation.

    Args:
        dispatch: how all ranks of the job share the experts; None: this process holds them all.
    """
    mesh = None if dispatch is None else init_mesh(torch.distributed.get_world_size())
    opened = gd.ExpertPool.open(pool)

    def work(device: torch.device, seen: Any) -> list[torch.Tensor]:
        model = MODELS[name]().requires_grad_(False).to(device)
        gd.attach_pool(
            model, opened, gd.RouterConfig(**ALPHAS, **router), mesh, dispatch=dispatch or "auto", costs=Costs()
        )
        draw = torch.Generator().manual_seed(0 if mesh is None else mesh.rank)
        ids = torch.randint(4, 256, (len(LENGTHS), max(LENGTHS)), generator=draw)
        mask = torch.tensor([[0] * (max(LENGTHS) - real) + [1] * real for real in LENGTHS])
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        similarity = torch.rand(len(LENGTHS), len(opened), generator=draw)
        with torch.no_grad(), gd.query_scores(model, similarity):
            if generate:
                made = gd.generate(model, **inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
                return [made, *gd.routing_stats(model).values()]
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
            model(**inputs, use_cache=False)
            seen.clear()
            return [model(**inputs, use_cache=False).logits]

    with pytest.MonkeyPatch.context() as patch:
        if where == "standin" and len(opened) >= 40:
            # So many experts have their rows sorted, as no tiny model has on a GPU.
            patch.setattr("glider_dist.lora.ways.cheapest_way", lambda *_: "sorted")
        return on_both(where, work)


def count_kernels(where: str, pool: Path) -> Both:
    """A second forward of a tiny Llama in bfloat16, without padding."""
    similarity = torch.rand(3, 12)

    def work(device: torch.device, seen: Any) -> list[torch.Tensor]:
        model = MODELS["llama"]().requires_grad_(False).to(device, torch.bfloat16)
        gd.attach_pool(model, gd.ExpertPool.open(pool), gd.RouterConfig(**ALPHAS))
        ids = torch.arange(4, 31).view(3, 9).to(device)
        with torch.no_grad(), gd.query_scores(model, similarity):
            model(input_ids=ids, use_cache=False)
            seen.clear()
            return [model(input_ids=ids, use_cache=False).logits.float()]

    return on_both(where, work)


def rank(where: str, name: str, pool: Path) -> Both:
    """The choices that a routed model finds likeliest, and the nll of targets."""

    def work(device: torch.device, seen: Any) -> list[torch.Tensor]:
        model = MODELS[name]().requires_grad_(False).to(device)
        base = BaseModel(model, tiny_tokenizer(), torch.float32, device, "tiny", "test")
        gd.attach_pool(model, gd.ExpertPool.open(pool), gd.RouterConfig(**ALPHAS))
        collator = Collator(base, 64)
        choices = [("alpha", "a longer one"), None, ("beta", "g", "delta"), ("x", "y")]
        queries = []
        for place, given in enumerate(choices):
            example = Example(str(place), f"question {place} " * (place + 1), "x", ("x",), given)
            task = Task("t", "", "held_in", "exact_match", "", (), (), False, lambda part, one=example: [one])
            queries.append(Query(task, example, "", collator.encode(example.input, answer("x y")), None))
        similarity = torch.rand(len(queries), 5, generator=torch.Generator().manual_seed(0))

        def scope(chosen: Sequence[int]) -> AbstractContextManager[Any]:
            return gd.query_scores(model, similarity[list(chosen)])

        best = rank_choices(model, collator, queries, 6, scope)
        runner = QueryRunner(FrozenBase(base, replace(joined_ranks(), device=device), 0), collator, 3)
        nll = runner.nll([query.encoded for query in queries], scope)
        return [torch.tensor([-1 if one is None else one for one in best]), nll]

    return on_both(where, work)


def exchange(where: str, strategy: str, frozen: bool) -> tuple[Both, int]:
    """One exchange between all ranks and its backward, and the waits that it says it makes."""
    case = Case("zipf", dtype=torch.float32, frozen=frozen)
    mesh = rank_cases.mesh_of(torch.distributed.get_world_size())
    placement = case.place(mesh.expert_parallel)
    whole = rank_cases.draw_experts(case)
    own = rank_cases.own_part(case, whole, placement.owned(mesh.expert_rank))
    inputs = rank_cases.draw_inputs(case, mesh.expert_parallel, placement)[mesh.rank]
    stated = 0

    def work(device: torch.device, seen: Any) -> list[torch.Tensor]:
        nonlocal stated

        def leaf(tensor: torch.Tensor, wanted: bool = True) -> torch.Tensor:
            return tensor.detach().clone().to(device).requires_grad_(wanted)

        banks = [
            SiteBank(
                leaf(bank.A, not frozen),
                leaf(bank.B, not frozen),
                bank.scale.to(device),
                bank.eligible.to(device),
                bank.ranks,
            )
            for bank in own
        ]
        scales = {site: bank.scale.to(device) for site, bank in zip(case.sites, whole, strict=True)}
        dispatch = Dispatch(mesh, placement, strategy, scales, device, Costs())
        x = leaf(inputs.x)
        routes = [Route(r.expert_ids.to(device), leaf(r.weights), r.ragged) for r in inputs.routes]
        cotangents = [cotangent.to(device) for cotangent in inputs.cotangents]
        seen.clear()
        with count_traffic() as traffic:
            outs = dispatch(x, case.sites, routes, banks)
            rank_cases.backward(outs, cotangents)
        stated = traffic.host_syncs
        leaves = [x, *(route.weights for route in routes)]
        leaves += [tensor for bank in banks for tensor in (bank.A, bank.B) if tensor.requires_grad]
        return [*outs, *(each.grad for each in leaves if each.grad is not None)]

    return on_both(where, work), stated


def train(where: str, kind: str, checkpointing: bool) -> tuple[Both, int]:
    """Some steps of co-training without validations, and how many forwards they took."""
    ranks = joined_ranks()
    forwards = 0

    def work(device: torch.device, seen: Any) -> list[torch.Tensor]:
        nonlocal forwards
        base = cotraining_worker.base_model(torch.float32)
        base.model.to(device)
        moved = replace(base, device=device)
        frozen = FrozenBase(moved, replace(ranks, device=device), 0)
        forwards = 0

        def count(*_: Any) -> None:
            nonlocal forwards
            forwards += 1

        base.model.register_forward_pre_hook(count)
        trainees = [cotraining_worker.trainee(name, steps=4) for name in ("one", "three", "six")]
        found = cotraining_worker.train(frozen, moved, kind, trainees, len(trainees), checkpointing=checkpointing)
        return [one["row"] for one in found.values()]

    return on_both(where, work), forwards


def mistakes() -> None:
    """What the stand-in is there to see."""
    from standin import DEVICE, stand_in

    with stand_in() as mode:
        far, near = torch.arange(6, device=DEVICE), torch.ones(6)
        mixed: list[Callable[[], Any]] = [
            lambda: far + near,
            lambda: far[torch.tensor([1])],
            lambda: near.index_select(0, far),
        ]
        for mistake in mixed:
            with pytest.raises(RuntimeError, match="two devices"):
                mistake()
        assert (far * 2 + 1).device == DEVICE
        assert not mode.waits
        waits: list[Callable[[], Any]] = [
            lambda: far.tolist(),
            lambda: far[far > 2],
            lambda: bool(far[0]),
            lambda: far.nonzero(),
            lambda: far.cpu(),
            lambda: near.copy_(far),
        ]
        for wait in waits:
            mode.waits.clear()
            wait()
            assert mode.waits.total() == 1
