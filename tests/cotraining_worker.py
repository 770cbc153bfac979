"""Six unequal tasks trained together on a tiny model: run under torchrun, and imported, by test_cotraining.py.

    torchrun --nproc_per_node N cotraining_worker.py ZERO_STAGE DTYPE REPLICAS FILE

trains experts, then gates, and writes their weights, losses and validations to FILE. Fails if the base
has changed.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from glider_dist.config import TrainConfig
from glider_dist.lora.bank import initial_site
from glider_dist.model.base import BaseModel
from glider_dist.model.batch import Collator, Encoded
from glider_dist.model.engine import FrozenBase
from glider_dist.model.sites import linear_sites
from glider_dist.parallel.ranks import Ranks, start_ranks
from glider_dist.parallel.replicas import SINGLE, Replicas, divide
from glider_dist.pool.adapter import SiteLora
from glider_dist.testing import tiny_causal, tiny_tokenizer
from glider_dist.training.batches import Packing
from glider_dist.training.cotrain import CoTraining
from glider_dist.training.order import share_out
from glider_dist.training.runner import Runner, installed
from glider_dist.training.slots import ExpertSlots, GateSlots, Slots
from glider_dist.training.trainee import Recipe, Trainee
from glider_dist.training.unfinished import Unfinished

SIZES = {"one": 3, "two": 5, "three": 9, "four": 14, "five": 20, "six": 31}
KINDS = ("expert", "gate")
STEPS = 50
MIXED = Packing(tokens=160, enough=160, mixed=160, overhead=16)
CPU = torch.device("cpu")


def recipe(name: str, **changes: Any) -> Recipe:
    """Six learning rates, and one task that takes fewer steps than the rest."""
    place = list(SIZES).index(name)
    made = Recipe.of(TrainConfig(learning_rate=2e-3 * (1 + place), batch_size=4, eval_every=20), seed=7)
    return dataclasses.replace(made, **{"steps": STEPS - 7 * (name == "two"), **changes})


def examples(name: str, part: str, count: int) -> list[Encoded]:
    draw = random.Random(f"{name}/{part}")
    longest = 4 + 3 * list(SIZES).index(name)
    return [
        Encoded(
            tuple(draw.randrange(4, 256) for _ in range(draw.randint(2, longest))),
            (*(draw.randrange(4, 256) for _ in range(draw.randint(1, 3))), 1),
        )
        for _ in range(count)
    ]


def trainee(name: str, **changes: Any) -> Trainee:
    return Trainee(
        name, examples(name, "train", SIZES[name]), examples(name, "validation", 5), recipe(name, **changes)
    )


def base_model(dtype: torch.dtype, **config: Any) -> BaseModel:
    """A tiny Llama. transformers' own norm computes in fp32 even in an fp64 model, torch's does not."""
    model: Any = tiny_causal(**config)
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, LlamaRMSNorm)]
    for name, norm in norms:
        parent, _, child = name.rpartition(".")
        replacement = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
        replacement.weight = norm.weight
        setattr(model.get_submodule(parent), child, replacement)
    return BaseModel(model.to(dtype).requires_grad_(False), tiny_tokenizer(), dtype, CPU, "tiny", "test")


def slots_for(base: BaseModel, kind: str, count: int) -> Slots:
    shapes = {name: site.shape for name, site in linear_sites(base.model).items()}
    dtype = torch.promote_types(base.dtype, torch.float32)
    if kind == "expert":
        return ExpertSlots(shapes, count, 4, 8.0, 7, dtype, base.device)

    def read(name: str) -> dict[str, SiteLora]:
        """An expert of rank 4 or 8 that lacks one site."""
        rank = 8 if name == "four" else 4
        loras = {}
        for site, shape in list(shapes.items())[: len(shapes) - (name == "five")]:
            bank = initial_site([name, f"{name} B"], site, (shape[0], max(shape)), rank, 8.0, 7)
            loras[site] = SiteLora(bank.A[0, :, : shape[1]] * 20, bank.A[1, :, : shape[0]].t() * 20, 0.5)
        return loras

    return GateSlots(shapes, dict.fromkeys(shapes, 8), read, count, dtype, base.dtype, base.device)


def train(
    frozen: FrozenBase,
    base: BaseModel,
    kind: str,
    trainees: Sequence[Trainee],
    slots: int,
    packing: Packing = MIXED,
    checkpointing: bool = False,
    unfinished: Unfinished | None = None,
    replicas: Replicas = SINGLE,
    on_done: Callable[[Trainee, torch.Tensor], None] = lambda trainee, row: None,
) -> dict[str, dict[str, Any]]:
    """Train on this rank; by name the best row ``[n]``, losses, validations and what else to compare."""
    made = slots_for(base, kind, slots)
    loop = CoTraining(Runner(frozen, Collator(base, 128), made), trainees, packing, unfinished, replicas)
    found: dict[str, dict[str, Any]] = {}

    def retire(trainee: Trainee, row: torch.Tensor) -> None:
        on_done(trainee, row)
        found[trainee.name] = {
            **dataclasses.asdict(trainee.progress), "row": row, "tensors": made.tensors(row[None]),
        }  # fmt: skip

    with installed(frozen.model, (), made.seen(), gated=kind == "gate", checkpointing=checkpointing):
        loop.run(retire)
    return found


def base_bits(model: torch.nn.Module) -> list[torch.Tensor]:
    """This rank's part of the base."""
    return [getattr(p, "ds_tensor", p).detach().clone() for p in model.parameters()]


def main(zero_stage: str, dtype: str, replicas_each: str, file: str) -> None:
    ranks: Ranks = start_ranks("cpu")
    base = base_model(getattr(torch, dtype))
    frozen = FrozenBase(base, ranks, int(zero_stage))
    before = base_bits(base.model)
    replicas = divide(ranks, int(replicas_each))
    together = {}
    for kind in KINDS:
        everyone = [trainee(name) for name in SIZES]
        mine = share_out([one.cost for one in everyone], replicas.teams)[replicas.team]
        # Fewer slots than experts on a rank: the last ones wait for the first.
        found = train(
            frozen, base, kind, [everyone[index] for index in mine], slots=max(1, len(mine) - 1), replicas=replicas
        )
        gathered = ranks.gather(found)
        assert [bool(part) for part in gathered] == [r % replicas.count == 0 for r in range(ranks.world)]
        together[kind] = {name: value for part in gathered for name, value in part.items()}
    after = base_bits(base.model)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the base has changed"
    if ranks.is_main:
        torch.save(together, file)
    ranks.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
