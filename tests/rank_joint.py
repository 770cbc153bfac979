"""Work that the tests of joint training run on every rank, and the same training in one process without it."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from cotraining_worker import CPU, base_model
from rank_cases import mesh_of, sum_over_replicas

import glider_dist as gd
from glider_dist.config import Config, MeshConfig, TrainConfig
from glider_dist.errors import GliderError
from glider_dist.model.attach import attach_pool, context_of, detach, query_scores
from glider_dist.model.batch import Collator, Encoded, target_nll
from glider_dist.model.engine import FrozenBase
from glider_dist.model.recompute import recomputed
from glider_dist.parallel.mesh import Mesh
from glider_dist.parallel.placement import Placement, balanced
from glider_dist.parallel.ranks import Ranks
from glider_dist.testing import random_pool, tiny_causal
from glider_dist.training import joint_loop
from glider_dist.training.batches import Packing
from glider_dist.training.deepspeed_moe import ExpertEngine
from glider_dist.training.joint_batches import Row
from glider_dist.training.joint_config import deepspeed_config
from glider_dist.training.joint_loop import JointLoop
from glider_dist.training.joint_params import Trained
from glider_dist.training.joint_routing import RouterExtras
from glider_dist.training.joint_settings import JointConfig
from glider_dist.training.joint_state import Tensors, gather_state, load_state
from glider_dist.training.trainee import Recipe

EXPERTS = 5
STEPS, BATCH = 10, 7
ROUTER = gd.RouterConfig(alpha_in=3.0, alpha_out=1.0, threshold=0.6)
PACKING = Packing(tokens=60, enough=60, mixed=60, overhead=8, rows=2)
RATES = {"experts": 2e-3, "gates": 5e-3}


@dataclass(frozen=True)
class Case:
    """One training run. ``engine``: ``deepspeed``, or ``plain`` for torch's own AdamW and all-reduces of ours."""

    zero_stage: int = 0
    parts: int = 1
    dispatch: str = "all_to_all"
    train: str = "both"
    chosen: tuple[str, ...] = ()
    clip: float = 0.0
    decay: float = 0.0
    placement: str = "contiguous"
    checkpointing: bool = False
    engine: str = "deepspeed"
    dtype: str = "float32"
    steps: int = STEPS
    batch: int = BATCH
    router: str = "glider"
    joint: dict[str, Any] = field(default_factory=dict)
    base_dtype: str | None = None

    def config(self) -> Config:
        return Config(
            zero_stage=self.zero_stage,
            train=TrainConfig(max_grad_norm=self.clip, weight_decay=self.decay, warmup_ratio=0.3),
            mesh=MeshConfig(expert_parallel=self.parts),
            joint=JointConfig(train=self.train, experts=list(self.chosen), **self.joint),
        )


@dataclass
class Found:
    """What a run ended with: experts, gates and moments, and each step's loss, router loss and norm."""

    state: dict[str, Tensors]
    losses: list[float]
    router_losses: list[float]
    norms: list[float]


def make_pool(path: Any) -> str:
    """Five experts of different ranks, of which two adapt only some sites."""
    sites = [None, ["q_proj", "v_proj"], None, ["gate_proj", "up_proj", "down_proj"], None]
    random_pool(path, tiny_causal(), ranks=[1, 4, 8, 3, 9], sites=sites)
    return str(path)


def rows_of(step: int, batch: int) -> list[Row]:
    """Other lengths in every row; the query is a name from which its scores follow."""
    draw = random.Random(step)
    rows = []
    for place in range(batch):
        prompt = tuple(draw.randrange(4, 250) for _ in range(draw.randint(2, 14)))
        answer = (*(draw.randrange(4, 250) for _ in range(draw.randint(1, 4))), 1)
        rows.append(Row(f"{step}/{place}", Encoded(prompt, answer), place))
    return rows


def similarity(rows: Sequence[Row], dtype: torch.dtype) -> torch.Tensor:
    drawn = [random.Random(row.query) for row in rows] or [random.Random(0)]
    return torch.tensor([[draw.random() for _ in range(EXPERTS)] for draw in drawn], dtype=dtype)


def recipes(case: Case) -> dict[str, Recipe]:
    train = case.config().train
    return {
        kind: Recipe(
            case.steps, case.batch, rate, 0, train.weight_decay, 0.3, train.max_grad_norm, 100, None, 5, 64
        )
        for kind, rate in RATES.items()
    }


class PlainEngine:
    """The interface of ExpertEngine without DeepSpeed, which takes no float64; gradients are summed here."""

    def __init__(self, experts: Tensors, gates: Tensors, mesh: Mesh | None, case: Case):
        self.leaves = {key: value.clone().requires_grad_() for key, value in {**experts, **gates}.items()}
        self.gates, self.mesh, self.case = set(gates), mesh, case
        groups = [
            {"params": [leaf for key, leaf in self.leaves.items() if (key in gates) == (kind == "gates")]}
            for kind in RATES
        ]
        self.kinds = [kind for kind, group in zip(RATES, groups, strict=True) if group["params"]]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=case.decay)

    def values(self) -> Tensors:
        return {
            key: leaf.view_as(leaf) if torch.is_grad_enabled() else leaf.detach()
            for key, leaf in self.leaves.items()
        }

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self, rates: dict[str, float]) -> float:
        world = dist.get_world_size()
        square = {True: torch.zeros((), dtype=torch.float64), False: torch.zeros((), dtype=torch.float64)}
        for key, leaf in self.leaves.items():
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            if key in self.gates or self.mesh is None:
                dist.all_reduce(leaf.grad)
            else:
                sum_over_replicas(self.mesh, leaf.grad)
            leaf.grad /= world
            square[key in self.gates] += leaf.grad.double().square().sum()
        if self.mesh is not None and self.mesh.expert_group is not None:
            dist.all_reduce(square[False], group=self.mesh.expert_group)
        norm = math.sqrt(float(square[True] + square[False]))
        if self.case.clip and norm > self.case.clip:
            for leaf in self.leaves.values():
                leaf.grad *= self.case.clip / (norm + 1e-6)
        for kind, group in zip(self.kinds, self.optimizer.param_groups, strict=True):
            group["lr"] = rates[kind]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def gradient(self, key: str) -> torch.Tensor:
        grad = self.leaves[key].grad / dist.get_world_size()
        if self.mesh is None or self.mesh.replica_group is not None:
            dist.all_reduce(grad, group=None if self.mesh is None else self.mesh.replica_group)
        return grad

    def full(self, key: str, moment: str | None = None) -> torch.Tensor:
        leaf = self.leaves[key]
        return (leaf if moment is None else self.optimizer.state[leaf][moment]).detach()


def ranks() -> Ranks:
    rank, world = dist.get_rank(), dist.get_world_size()
    return Ranks(rank, world, CPU, dist.group.WORLD if world > 1 else None)


@contextlib.contextmanager
def prepared(case: Case, path: str) -> Iterator[tuple[JointLoop, Trained, Any]]:
    """The loop of a case, its model attached."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    dtype = getattr(torch, case.dtype)
    base = base_model(getattr(torch, case.base_dtype or case.dtype))
    pool, mesh = gd.ExpertPool.open(path), mesh_of(case.parts) if dist.get_world_size() > 1 else None
    cfg = case.config()
    placed: Placement | None = None
    if case.placement == "balanced" and case.parts > 1:
        placed = balanced(pool.names, case.parts, {name: 1.0 * i for i, name in enumerate(pool.names)})
    if case.engine == "deepspeed":
        FrozenBase(base, ranks(), case.zero_stage)
    router = gd.RouterConfig(kind=case.router, alpha_in=3.0, alpha_out=1.0, threshold=0.6)
    attach_pool(base.model, pool, router, mesh, case.dispatch if case.parts > 1 else "auto", dtype, placed)
    try:
        context = context_of(base.model)
        owned = range(EXPERTS)
        if context.dispatch is not None:
            owned = context.dispatch.placement.owned(mesh.expert_rank)
        trained = Trained(context, owned, case.chosen, case.train != "gates", case.train != "experts")
        if case.engine == "plain":
            engine: Any = PlainEngine(*trained.initial(), mesh, case)
        else:
            config = deepspeed_config(cfg, dist.get_world_size(), 1e-3, trained.elements)
            engine = ExpertEngine(*trained.initial(), case.parts, config)
        extras = RouterExtras(cfg.joint, 3, 2, len(context.banks))

        def scope(rows: Sequence[Row]) -> Any:
            return query_scores(base.model, extras.drop(similarity(rows, dtype)))

        collator = Collator(base, 128)
        loop = JointLoop(base.model, collator, engine, trained, scope, recipes(case), PACKING, extras)
        with recomputed(base.model) if case.checkpointing else contextlib.nullcontext():
            yield loop, trained, engine
    finally:
        detach(base.model)


def train(case: Case, path: str) -> Found:
    """Train on this rank; its own experts' state, and losses of the whole job."""
    with prepared(case, path) as (loop, trained, engine):
        steps = [loop.step(rows_of(step, case.batch)) for step in range(case.steps)]
        return Found(
            gather_state(engine, trained),
            [step.loss for step in steps],
            [step.router_loss for step in steps],
            [step.norm for step in steps],
        )


@dataclass
class Half:
    """A part of a training: its state after what it was given was loaded, and at its end; and updates so far."""

    loaded: dict[str, Tensors]
    state: dict[str, Tensors]
    steps: int


def train_part(case: Case, path: str, first: int, last: int, state: dict[str, Tensors] | None) -> Half:
    """Steps ``first`` to ``last``, from ``state`` if there is one."""
    with prepared(case, path) as (loop, trained, engine):
        if state is not None:
            load_state(engine, trained, state.__getitem__)
            engine.steps = loop.progress.step = first
        loaded = gather_state(engine, trained)
        for step in range(first, last):
            loop.step(rows_of(step, case.batch))
        return Half(loaded, gather_state(engine, trained), engine.steps)


def first_gradients(case: Case, path: str) -> dict[str, Any]:
    """What the guard of the first step is shown, and what it says of a gradient that belongs elsewhere."""
    shown: list[Any] = []
    check = joint_loop.check_gradients
    with prepared(case, path) as (loop, _, _):
        joint_loop.check_gradients = lambda *given: shown.append(given)  # type: ignore[assignment]
        try:
            loop.step(rows_of(0, case.batch))
            loop.step(rows_of(1, case.batch))
        finally:
            joint_loop.check_gradients = check
        ((names, sites, norms, tokens),) = shown
        stray = norms.clone()
        stray[tokens == 0] = 1.0
        try:
            check(names, sites, norms, tokens)
            said = ""
            check(names, sites, stray, tokens)
        except GliderError as error:
            said = str(error)
        return {"names": names, "norms": norms, "tokens": tokens, "said": said}


def train_all(cases: Sequence[Case], path: str) -> list[Found]:
    return [train(case, path) for case in cases]


def reference(case: Case, path: str) -> Found:
    """The same in one process with every expert: one forward a step, torch's AdamW and clipping, no code of the
    loop, its parameters or its engine."""
    dtype = getattr(torch, case.dtype)
    base = base_model(getattr(torch, case.base_dtype or case.dtype))
    pool = gd.ExpertPool.open(path)
    router = gd.RouterConfig(kind=case.router, alpha_in=3.0, alpha_out=1.0, threshold=0.6)
    attach_pool(base.model, pool, router, dtype=dtype)
    context, collator = context_of(base.model), Collator(base, 128)
    leaves: dict[str, list[torch.Tensor]] = {"experts": [], "gates": []}
    named: Tensors = {}
    chosen = [i for i, name in enumerate(pool.names) if not case.chosen or name in case.chosen]
    for site, bank in context.banks.items():
        if case.train != "gates":
            named |= {f"{site}.A": bank.A.requires_grad_(), f"{site}.B": bank.B.requires_grad_()}
            leaves["experts"] += [bank.A, bank.B]
        if case.train != "experts":
            named[f"{site}.gate"] = context.gates[site].requires_grad_()
            leaves["gates"].append(context.gates[site])
    groups = [{"params": found, "kind": kind} for kind, found in leaves.items() if found]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    every = [leaf for found in leaves.values() for leaf in found]
    before = [leaf.detach().clone() for leaf in every]
    others = [i for i in range(EXPERTS) if i not in chosen]
    losses, norms = [], []
    for step in range(case.steps):
        rows = rows_of(step, case.batch)
        with query_scores(base.model, similarity(rows, dtype)):
            batch = collator.batch([row.encoded for row in rows])
            loss = target_nll(base.model, batch).sum() / batch.targets.sum()
            loss.backward()
        for leaf in every:
            if leaf.grad is not None:
                leaf.grad[others] = 0.0
        norms.append(float(torch.nn.utils.clip_grad_norm_(every, case.clip or math.inf)))
        for group in optimizer.param_groups:
            group["lr"] = recipes(case)[group["kind"]].update(step + 1).learning_rate
            if case.decay:
                for leaf in group["params"]:
                    with torch.no_grad():
                        leaf[chosen] *= 1 - group["lr"] * case.decay
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state: dict[str, Tensors] = {}
    for expert in chosen:
        state[pool.names[expert]] = {}
        for key, leaf in named.items():
            rank = context.banks[key.rpartition(".")[0]].ranks[expert]
            for moment in (None, "exp_avg", "exp_avg_sq") if rank else ():
                whole = leaf if moment is None else optimizer.state[leaf][moment]
                part = whole[expert] if key.endswith(".gate") else whole[expert, :rank]
                state[pool.names[expert]][key if moment is None else f"{key}.{moment}"] = part.detach().clone()
    changed = any(not torch.equal(leaf, old) for leaf, old in zip(every, before, strict=True))
    detach(base.model)
    assert changed
    return Found(state, losses, [0.0] * len(losses), norms)


def train_past_the_range(case: Case, path: str, good: int) -> tuple[str, bool, int]:
    """So many good steps and one whose gradient is not finite although its loss is: the error, whether all stayed
    as it was, and the number of the last step."""
    with prepared(case, path) as (loop, trained, engine):
        for step in range(good):
            loop.step(rows_of(step, case.batch))
        before, backward = gather_state(engine, trained), engine.backward
        engine.backward = lambda loss, last: backward(loss * float("inf"), last)
        try:
            loop.step(rows_of(good, case.batch))
        except GliderError as error:
            after = gather_state(engine, trained)
            same = all(
                torch.equal(value, after[name][key]) for name in before for key, value in before[name].items()
            )
            return str(error), same, loop.progress.step
        return "", False, loop.progress.step


def gates_beside_uneven_experts(file: str) -> list[list[float]]:
    """Each step's values of six gates, which are 1 to 6 and stay so, on ranks of three experts and of one.

    Args:
        file: additions to DeepSpeed's configuration.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    cfg = Config(zero_stage=3, mesh=MeshConfig(expert_parallel=2), joint=JointConfig(deepspeed=file))
    experts = {"one": torch.ones(1 if dist.get_rank() else 3, 4, 6)}
    gates = {f"gate {index}": torch.full((11,), index + 1.0) for index in range(6)}
    engine = ExpertEngine(experts, gates, 2, deepspeed_config(cfg, 2, 1e-3, 1000))
    seen = []
    for _ in range(5):
        values = engine.values()
        seen.append([float(values[key].detach().mean()) for key in gates])
        engine.backward(torch.stack([value.square().sum() for value in values.values()]).sum(), last=True)
        engine.step({"experts": 0.0, "gates": 0.0})
    return seen


def originals_left(case: Case, path: str) -> set[str]:
    """Of which experts and gates that train the values from before are still in memory after two steps."""
    seen: list[tuple[str, Any]] = []
    initial = Trained.initial

    def noted(trained: Trained) -> tuple[Tensors, Tensors]:
        given = initial(trained)
        seen.extend((key, weakref.ref(value)) for part in given for key, value in part.items())
        for key in (*trained.experts, *trained.gates):
            site, _, kind = key.rpartition(".")
            stack = trained.context.gates[site] if kind == "gate" else getattr(trained.context.banks[site], kind)
            seen.append((key, weakref.ref(stack)))
        return given

    Trained.initial = noted  # type: ignore[method-assign]
    try:
        with prepared(case, path) as (loop, _, _):
            for step in range(2):
                loop.step(rows_of(step, case.batch))
            gc.collect()
            assert seen
            return {key for key, value in seen if value() is not None}
    finally:
        Trained.initial = initial  # type: ignore[method-assign]
