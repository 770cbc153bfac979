"""The settings of ``glider-dist plan`` and ``--dry-run``: the machines, the pool, and what is only estimated."""

from __future__ import annotations

from dataclasses import dataclass

from glider_dist.fields import not_negative, positive, setting


@dataclass
class PlanConfig:
    """The figures for an H100 are those of NVIDIA's H100 SXM and DGX H100 data sheets."""

    nodes: int = positive(1, "nodes of the job; --ranks N plans for N ranks instead")
    gpus_per_node: int = positive(8, "GPUs of a node, one rank each")
    device_gb: float = positive(80.0, "memory of a GPU in units of 1e9 bytes")
    reserve_gb: float = not_negative(
        4.0, "of it for what is not counted: CUDA context, NCCL buffers, fragmentation (estimated)"
    )
    base: str | None = setting(
        None, "folder with the base's config.json, weights are not read; None: the base's own folder or cache"
    )
    experts: int | None = positive(None, "experts; None: those of the pool, else the tasks in tasks.held_in")
    stages: list[str] = setting(
        ["train-experts", "train-gates", "calibrate", "evaluate"], "what glider-dist plan looks at, in order"
    )
    answer_tokens: int = positive(64, "tokens of an answer in training; prompts fill the rest of tasks.max_length")
    embedding_width: int = positive(384, "numbers of an embedding (all-MiniLM-L6-v2: 384)")
    tflops: float = positive(989.0, "peak of a GPU in the base's dtype, TFLOP/s (H100 SXM, dense bfloat16: 989)")
    utilisation: float = positive(0.4, "share of the peak that a step reaches (estimated)")
    launch_us: float = positive(18.0, "time to launch a kernel from Python, µs (training on an H100: 18)")
    memory_gb_s: float = positive(3350.0, "bandwidth of a GPU's memory, GB/s (H100 SXM: 3350)")
    node_gb_s: float = positive(
        450.0, "bandwidth from a GPU to the others of its node, one way, GB/s (H100 NVLink: 450)"
    )
    network_gb_s: float = positive(50.0, "the same to other nodes (one 400 Gbit/s adapter per GPU: 50)")
