"""DeepSpeed's configuration for joint training: ours, or a JSON file whose ``auto`` are filled in."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.pool.files import read_json
from glider_dist.training.adamw import BETAS, EPS
from glider_dist.training.joint_settings import JointConfig
from glider_dist.training.trainee import Recipe

_MOST_IN_A_BUCKET = 50_000_000
_PREFETCH = "stage3_prefetch_bucket_size"
# Left to the user where they are given; everything else must be what the job says.
_FREE = ("reduce_bucket_size", "allgather_bucket_size", _PREFETCH)
_FREE_THRESHOLD = "stage3_param_persistence_threshold"


def deepspeed_config(cfg: Config, world: int, learning_rate: float, elements: int) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given.

    The engine holds the experts and gates alone, in fp32 whatever the dtype of the base. We cut batches and scale
    losses ourselves, so to DeepSpeed every forward is a batch of one.

    Args:
        elements: trained numbers on this rank; buckets are no larger.

    Raises:
        GliderError: the file of ``joint.deepspeed`` contradicts the job.
    """
    bucket = max(1, min(elements, _MOST_IN_A_BUCKET))
    made: dict[str, Any] = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": learning_rate,
                "betas": list(BETAS),
                "eps": EPS,
                "weight_decay": cfg.train.weight_decay,
                "torch_adam": True,
            },
        },
        "gradient_clipping": cfg.train.max_grad_norm,
        "zero_optimization": {
            "stage": cfg.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # All parameters are fetched at once, so that there is nothing to gain.
            _PREFETCH: 0,
            _FREE_THRESHOLD: 0,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    if cfg.joint.deepspeed is None:
        return made
    path = Path(cfg.joint.deepspeed)
    given = read_json(path)
    for part in ("bf16", "fp16"):
        if given.pop(part, {}).get("enabled") is True:
            raise GliderError(
                f"{path}: {part} is on, but experts and gates train in fp32 over a base of any dtype; remove it"
            )
    if "scheduler" in given:
        raise GliderError(
            f"{path}: scheduler is set, but train-joint sets the learning rates itself; remove it and use "
            "train.warmup_ratio, joint.learning_rate and joint.gate_learning_rate"
        )
    result = _filled(given, made, str(path), "")
    prefetch = result["zero_optimization"][_PREFETCH]
    if cfg.zero_stage == 3 and cfg.mesh.expert_parallel > 1 and prefetch:
        # How far it prefetches depends on the elements that are there, of which ranks with more experts have more:
        # ranks would gather the gates in different groups.
        raise GliderError(
            f"{path}: zero_optimization.{_PREFETCH} is {prefetch}, with which ranks that own different experts "
            "(mesh.expert_parallel) would gather the gates in different groups; write auto"
        )
    return result


def check_joint(cfg: Config) -> None:
    """Raises GliderError for settings that cannot be trained with; before anything is read."""
    if cfg.zero_stage == 0 and cfg.mesh.expert_parallel > 1 and cfg.train.max_grad_norm:
        raise GliderError(
            "zero_stage=0 clips wrongly with mesh.expert_parallel above 1 (DeepSpeed issue 8475); "
            "use zero_stage=1, 2 or 3, or train.max_grad_norm=0"
        )
    trainable = cfg.router.kind in ("phatgoose", "global") or (
        cfg.router.kind == "glider" and cfg.router.local == "gate"
    )
    if not trainable:
        kind = f"{cfg.router.kind} with router.local={cfg.router.local}"
        raise GliderError(
            f"train-joint cannot train through router.kind={kind}: its scores would have to follow the experts; "
            "use glider, phatgoose or global"
        )
    if cfg.dispatch == "local" and cfg.mesh.expert_parallel > 1:
        raise GliderError(
            "dispatch=local cannot train experts that other ranks own; use auto, all_to_all or gather"
        )


def recipes_of(cfg: Config) -> dict[str, Recipe]:
    """Of experts and gates: their learning rates differ."""
    joint = cfg.joint
    rates = {
        "experts": joint.learning_rate or cfg.train.learning_rate,
        "gates": joint.gate_learning_rate or cfg.train.gate_learning_rate,
    }
    base = replace(
        Recipe.of(cfg.train, cfg.seed),
        steps=joint.steps or cfg.train.max_steps,
        batch_size=joint.batch_size or cfg.train.batch_size,
    )
    return {kind: replace(base, learning_rate=rate) for kind, rate in rates.items()}


def of_the_weights(joint: JointConfig) -> dict[str, Any]:
    """The settings of ``joint`` that trained weights depend on, apart from rounding."""
    return {
        key: value for key, value in asdict(joint).items() if key not in ("deepspeed", "prepare", "recalibrate")
    }


def _filled(given: dict[str, Any], made: dict[str, Any], path: str, prefix: str) -> dict[str, Any]:
    """``made``, with what ``given`` adds; a value that both have must be equal unless it is free."""
    result = dict(made)
    for name, value in given.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            result[name] = _filled(value, made.get(name, {}), path, f"{key}.")
        elif value == "auto" and name not in made:
            raise GliderError(f"{path}: {key} is auto, but train-joint has no value for it; write a number")
        elif value != "auto" and name in made and value != made[name] and name not in (*_FREE, _FREE_THRESHOLD):
            raise GliderError(
                f"{path}: {key} is {value}, but the job says {made[name]}; write auto, or change the job's setting"
            )
        elif value != "auto":
            result[name] = value
    return result
