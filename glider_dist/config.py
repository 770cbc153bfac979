"""Every setting of every stage, as typed dataclasses. ``settings.py`` fills them from YAML and ``key=value``.

The text after ``doc=`` is what ``glider-dist STAGE --help`` prints. Types and choices are checked when the
configuration is read, ranges by :meth:`Config.validate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from glider_dist.errors import GliderError
from glider_dist.fields import check_numbers as _check_numbers
from glider_dist.fields import finite as _finite
from glider_dist.fields import not_negative as _not_negative
from glider_dist.fields import positive as _positive
from glider_dist.fields import setting as _setting
from glider_dist.fields import share as _share
from glider_dist.planning.plan_settings import PlanConfig
from glider_dist.planning.slurm_settings import SlurmConfig
from glider_dist.semantics.settings import DescribeConfig, ServiceConfig
from glider_dist.training.joint_settings import JointConfig

OFFLINE_DEFAULT = "smollm2-135m"
"""The base that needs no network, whatever lies here under its name."""


@dataclass
class TasksConfig:
    source: str = _setting("procedural", "where tasks come from", ("procedural", "jsonl", "datasets"))
    path: str | None = _setting(
        None, "jsonl: the folder with tasks.json; datasets: a JSON file that maps data sets"
    )
    held_in: list[str] = _setting(
        [], "names of tasks to train experts for; empty: every task whose split is held_in"
    )
    held_out: list[str] = _setting(
        [], "names of tasks to evaluate only; empty: every task whose split is held_out"
    )
    shard: str | None = _setting(
        None, "i/n: of the held-in tasks only every n-th, from the i-th (0 to n - 1) on, as one job of an array"
    )
    limit: int | None = _positive(None, "examples per task and split at most; None: all (procedural: 512/64/64)")
    max_length: int = _positive(512, "tokens per example at most, prompt and answer together")


def shard_of(text: str) -> tuple[int, int]:
    """``i/n`` as numbers; raises GliderError unless 0 <= i < n."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise GliderError(f"tasks.shard is {text!r}, but must be i/n with 0 <= i < n, such as 0/4")
    return int(part), int(parts)


@dataclass
class TrainConfig:
    max_steps: int = _positive(1000, "optimizer steps per expert")
    gate_steps: int = _positive(100, "optimizer steps per gate")
    batch_size: int = _positive(16, "examples per step and expert")
    gate_batch_size: int | None = _positive(None, "examples per step and gate; None: train.batch_size")
    experts_in_flight: int | None = _positive(
        None, "experts (or gates) that a rank trains at a time, the others wait; None: 8 on a CPU, 32 on a GPU"
    )
    replicas: int | None = _positive(
        None,
        "ranks that train each expert together, each on its part of a step; None: what balances the ranks",
    )
    micro_batch_size: int | None = _positive(
        None, "examples per forward at most; None: train.micro_batch_tokens alone"
    )
    micro_batch_tokens: int | None = _positive(
        None, "tokens per forward at most, padding included; None: 2048 on a CPU, 8192 on a GPU"
    )
    learning_rate: float = _positive(5e-3, "AdamW learning rate of the experts")
    gate_learning_rate: float = _positive(5e-3, "AdamW learning rate of the gates")
    weight_decay: float = _not_negative(0.0, "AdamW weight decay")
    warmup_ratio: float = _setting(0.06, "share of the steps with linear warm-up; constant afterwards")
    max_grad_norm: float = _not_negative(1.0, "clip each expert's gradient norm at this value; 0: no clipping")
    eval_every: int = _positive(100, "validate every so many steps and at the end; the best weights are kept")
    eval_examples: int = _positive(64, "validation examples per task and validation")
    patience: int | None = _positive(
        None, "validations in a row without a better loss that end an expert's training; None: no early stop"
    )
    moments: str = _setting(
        "device",
        "where AdamW's moments live; host: less memory on a GPU, more time",
        ("device", "host"),
    )
    save_steps: int = _positive(100, "keep unfinished experts in run_dir/checkpoints every so many steps")
    save_minutes: float = _positive(10.0, "and at the latest after so many minutes")
    keep_last: int = _positive(2, "checkpoints kept of each expert; an older one serves if the newest is damaged")
    max_failures: int = _positive(
        5, "steps in a row whose loss or gradient is not finite (they are skipped) that end an expert's training"
    )
    gradient_checkpointing: bool = _setting(False, "recompute activations in the backward pass to save memory")


@dataclass
class LoraConfig:
    rank: int = _positive(16, "rank r of A [r, d_in] and B [d_out, r]")
    alpha: float = _positive(1.0, "lora_alpha; the expert's output is scaled by alpha / rank")
    targets: list[str] = _setting(
        [], "end of the names of the linear layers to adapt; empty: every linear layer but the output head"
    )


@dataclass
class MeshConfig:
    expert_parallel: int = _positive(1, "ranks that share one copy of the pool (1: every rank holds every expert)")
    placement: str = _setting(
        "contiguous", "how experts are shared out; balanced: by the load in mesh.load", ("contiguous", "balanced")
    )
    load: str | None = _setting(None, "results.json of an earlier evaluation, for mesh.placement=balanced")


@dataclass
class RouterConfig:
    """How tokens choose experts. ``gd.RouterConfig`` is this class.

    ``alpha_in``, ``alpha_out`` and ``threshold`` left at None take the pool's calibration, else 100, 3 and 0.5.
    """

    kind: str = _setting(
        "glider",
        "routing strategy",
        (
            "glider", "phatgoose", "global", "arrow", "lag", "average_activation",
            "merged", "ties", "dare", "oracle", "base",
        ),
    )  # fmt: skip
    local: str = _setting("gate", "local score of glider; arrow and lag need no gates", ("gate", "arrow", "lag"))
    top_k: int = _positive(2, "experts per token")
    top_p: float | None = _share(None, "if set, replaces top_k: keep the smallest set with this probability")
    top_p_max: int = _positive(8, "experts per token at most under top_p")
    alpha_in: float | None = _finite(None, "weight of the global score when some expert describes the query")
    alpha_out: float | None = _finite(None, "weight of the global score otherwise")
    threshold: float | None = _finite(None, "cosine over which an expert counts as describing the query")
    temperature: float = _positive(1.0, "softmax temperature of arrow and lag")
    lag_candidates: int = _positive(5, "experts per token that arrow proposes and lag chooses from")
    general: list[str] = _setting(
        [],
        "arrow and lag: general-knowledge experts; their mean is subtracted from the others, none is routed to",
    )
    merge_density: float = _share(0.5, "share of the weights that ties and dare keep")
    merge_seed: int = _setting(0, "seed of the weights that dare drops")
    shortlist: int | None = _positive(
        None, "consider only the M globally nearest experts of each query, whatever the router scores; None: all"
    )


@dataclass
class EvaluateConfig:
    routers: list[str] = _setting(
        ["base", "merged", "phatgoose", "glider", "oracle"], "rows of the table, in order"
    )
    queries: int = _positive(100, "test queries per task at most")
    batch_size: int = _positive(
        64,
        "queries per batch, of any tasks: of answers and choices here, of calibrate and of average-activations",
    )
    max_new_tokens: int = _positive(16, "answer length at most, in tokens")
    rank_classification: bool = _setting(False, "also score tasks with choices by the likelihood of each choice")
    save_minutes: float = _positive(1.0, "keep the answers of an unfinished row so often, for a restart")
    bootstrap: int = _positive(1000, "bootstrap samples of the 95 % intervals")


@dataclass
class CalibrateConfig:
    queries: int = _positive(16, "validation queries per held-in task")
    alphas: list[float] = _setting(
        [1.0, 3.0, 10.0, 20.0, 50.0, 100.0], "candidate values of alpha_in and alpha_out"
    )


@dataclass
class Config:
    base: str = _setting(
        "auto",
        "base model: smollm2-135m, a hub id, a model folder or a .gguf file; auto: the one that the pool was made "
        "for, smollm2-135m for a new pool",
    )
    pool: str | None = _setting(None, "the pool's folder; None: run_dir/pool for quickstart, an error elsewhere")
    run_dir: str | None = _setting(None, "config, log, metrics and results go here; None: runs/STAGE")
    seed: int = _setting(0, "seed of tasks, initial weights, data order and bootstrap")
    device: str = _setting("auto", "device of the base model", ("auto", "cpu", "cuda"))
    dtype: str = _setting(
        "auto", "dtype of the base model; auto: bfloat16 where it is fast", ("auto", "float32", "bfloat16")
    )
    base_bits: int | None = _setting(
        None,
        "8 or 4: the base's linear layers with so many bits a weight, by bitsandbytes; None: as dtype says",
    )
    zero_stage: int = _setting(
        0, "3: the base sharded over the ranks; 1, 2, 3: of train-joint also optimizer, gradients, experts"
    )
    dispatch: str = _setting(
        "auto",
        "how tokens and the experts of other ranks meet; auto: the cheaper way at each exchange",
        ("auto", "local", "all_to_all", "gather"),
    )
    embedder: str = _setting(
        "all-minilm-l6-v2", "sentence-transformers id or folder; the default needs no network"
    )
    describe_file: str | None = _setting(
        None, "text file of lines EXPERT: DESCRIPTION for experts that no task of their name describes"
    )
    max_minutes: float | None = _positive(None, "stop tidily after so many minutes, exit code 85; None: no limit")
    tracking: str = _setting("offline", "Weights & Biases mode", ("offline", "online", "off"))
    tasks: TasksConfig = field(default_factory=TasksConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    service: ServiceConfig = field(default_factory=ServiceConfig)
    describe: DescribeConfig = field(default_factory=DescribeConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def validate(self) -> None:
        """Check ranges that types cannot express.

        Raises:
            GliderError: naming the setting, its value and what is allowed.
        """
        _check_numbers(self)
        if self.zero_stage not in (0, 1, 2, 3):
            raise GliderError(f"zero_stage is {self.zero_stage}, but must be 0, 1, 2 or 3")
        if self.base_bits not in (None, 4, 8):
            raise GliderError(f"base_bits is {self.base_bits}, but must be 4 or 8")
        if self.base_bits and self.zero_stage == 3:
            raise GliderError("base_bits and zero_stage=3 exclude each other; a quantised base is not sharded")
        if not 0 <= self.joint.expert_dropout < 1:
            raise GliderError(f"joint.expert_dropout is {self.joint.expert_dropout}, but must lie in [0, 1)")
        if self.tasks.shard is not None:
            shard_of(self.tasks.shard)
        if self.mesh.placement == "balanced" and self.mesh.load is None:
            raise GliderError("mesh.placement=balanced needs mesh.load, the results.json of an earlier evaluation")
        if self.router.top_p is not None and not 0 < self.router.top_p <= 1:
            raise GliderError(f"router.top_p is {self.router.top_p}, but must lie in (0, 1]")
        if not 0 < self.router.merge_density <= 1:
            raise GliderError(f"router.merge_density is {self.router.merge_density}, but must lie in (0, 1]")
        if not 0 <= self.train.warmup_ratio < 1:
            raise GliderError(f"train.warmup_ratio is {self.train.warmup_ratio}, but must lie in [0, 1)")
        alphas = self.calibrate.alphas
        if not alphas or not all(0 <= alpha < math.inf for alpha in alphas):
            raise GliderError("calibrate.alphas must name at least one value, all finite and none negative")
        both = set(self.tasks.held_in) & set(self.tasks.held_out)
        if both:
            raise GliderError(
                f"task {sorted(both)[0]!r} is in tasks.held_in and in tasks.held_out; keep it in one"
            )
