"""Settings of ``train-joint``."""

from __future__ import annotations

from dataclasses import dataclass

from glider_dist.fields import not_negative, positive, setting


@dataclass
class JointConfig:
    """The stage train-joint. What is left at None is taken from ``train``."""

    train: str = setting("both", "what trains; the rest stays as it is", ("both", "experts", "gates"))
    experts: list[str] = setting([], "experts that train, with their gates; empty: all")
    steps: int | None = positive(None, "optimizer steps; None: train.max_steps")
    batch_size: int | None = positive(
        None, "examples per step of the whole job, whatever its world; None: train.batch_size"
    )
    learning_rate: float | None = positive(None, "of the experts; None: train.learning_rate")
    gate_learning_rate: float | None = positive(None, "of the gates; None: train.gate_learning_rate")
    balance_loss: float = not_negative(0.0, "weight of the load-balance loss; 0: off")
    z_loss: float = not_negative(0.0, "weight of the router z-loss; 0: off")
    expert_dropout: float = setting(0.0, "chance that a query may not use an expert in a step; 0: off")
    router_noise: float = not_negative(0.0, "standard deviation of noise on the routers' scores; 0: off")
    multitask: bool = setting(
        False, "train one fresh LoRA, named multitask, on all tasks instead; needs its own pool"
    )
    deepspeed: str | None = setting(
        None, "DeepSpeed's JSON file; None: launch_configs/deepspeed says what is used"
    )
    prepare: bool = setting(
        False, "first run what the pool lacks: train-experts, train-gates, describe, index and calibrate"
    )
    recalibrate: bool = setting(True, "calibrate again afterwards if the pool had a calibration")
