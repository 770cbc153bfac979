"""Work that the tests of what we assume of DeepSpeed run on every rank."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from glider_dist.errors import GliderError
from glider_dist.training.deepspeed_moe import MOMENTS, ExpertEngine

RATES = {"experts": 1e-2, "gates": 3e-3}
MICROS, STEPS = 2, 5


def config(stage: int, clip: float = 0.0) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.1}},
        "gradient_clipping": clip,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            # Smaller than the parameters together: several buckets.
            "reduce_bucket_size": 60,
            "allgather_bucket_size": 60,
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def start() -> tuple[int, int]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    return dist.get_rank(), dist.get_world_size()


def initial() -> dict[str, torch.Tensor]:
    """Three experts at two sites of equal shapes, as buckets would mix them up, and a gate."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"one": (3, 4, 6), "two": (3, 4, 6), "gate": (3, 11)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def gradients(step: int, micro: int, rank: int, values: dict[str, torch.Tensor], idle: bool) -> torch.Tensor:
    """A loss of one rank's tokens. Ranks use the parameters in another order; idle ones use the gate alone."""
    generator = torch.Generator().manual_seed(step * 100 + micro * 10 + rank)
    weights = {key: torch.randn(value.shape, generator=generator) for key, value in initial().items()}
    order = ["one", "two", "gate"] if rank % 2 else ["gate", "two", "one"]
    used = [key for key in order if key in values and (key == "gate" or not (idle and rank == 1))]
    return torch.stack([(values[key].square() * weights[key]).sum() for key in used]).sum()


def compare(stage: int, parts: int, clip: float, idle: bool) -> dict[str, float]:
    """Errors of weights, moments and norms against one process, after five steps of two micro-batches."""
    rank, world = start()
    whole = initial()
    owned = [[0, 1, 2]] if parts == 1 else [[0, 1], [2]]
    mine = owned[rank % parts]
    group = [r for r in range(world) if r // parts == rank // parts]
    engine = ExpertEngine(
        {"one": whole["one"][mine], "two": whole["two"][mine]}, {"gate": whole["gate"]}, parts, config(stage, clip)
    )
    plain = {key: value.clone().requires_grad_() for key, value in whole.items()}
    optimizer = torch.optim.AdamW(
        [{"params": [plain["one"], plain["two"]]}, {"params": [plain["gate"]]}], lr=1e-2, weight_decay=0.1
    )
    for choice, rate in zip(optimizer.param_groups, RATES.values(), strict=True):
        choice["lr"] = rate
    errors = {"weights": 0.0, "moments": 0.0, "norms": 0.0}
    for step in range(STEPS):
        for micro in range(MICROS):
            values = engine.values()
            loss = gradients(step, micro, rank, {"gate": values["gate"]}, idle)
            # What the group's tokens do to the experts arrives at their owner.
            for other in group:
                full = {key: torch.zeros_like(whole[key]) for key in ("one", "two")}
                for key in full:
                    full[key] = full[key].index_copy(0, torch.tensor(mine), values[key])
                loss = loss + gradients(step, micro, other, full, idle) if not (idle and other == 1) else loss
            engine.backward(loss, micro == MICROS - 1)
        norm = engine.step(RATES)
        for micro in range(MICROS):
            for other in range(world):
                (gradients(step, micro, other, plain, idle) / world).backward()
        wanted = float(torch.nn.utils.clip_grad_norm_(list(plain.values()), clip or float("inf")))
        optimizer.step()
        optimizer.zero_grad()
        errors["norms"] = max(errors["norms"], abs(norm / wanted - 1))
    for key, value in plain.items():
        for moment in (None, *MOMENTS):
            target = value.detach() if moment is None else optimizer.state[value][moment]
            target = target if key == "gate" else target[mine]
            error = float((engine.full(key, moment) - target).abs().max() / target.abs().max())
            kind = "weights" if moment is None else "moments"
            errors[kind] = max(errors[kind], error)
    return errors


def unmarked(stage: int) -> str:
    """What happens to experts that differ between ranks and are not marked: the guard's sentence."""
    rank, _ = start()
    try:
        ExpertEngine({"one": torch.full((2, 3, 4), float(rank))}, {}, 1, config(stage))
    except GliderError as error:
        return str(error)
    return ""


def native_under_zero_3() -> str:
    """Whether ZeRO 3 takes the marker of ZeRO 2."""
    start()
    from glider_dist.training import deepspeed_moe

    real = deepspeed_moe._experts
    deepspeed_moe._experts = lambda tensors, parts, stage: real(tensors, parts, 2)
    try:
        ExpertEngine({"one": torch.ones(2, 3, 4)}, {}, 2, config(3))
    except AssertionError as error:
        return str(error)
    finally:
        deepspeed_moe._experts = real
    return ""
