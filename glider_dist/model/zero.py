"""DeepSpeed for a frozen base: its configuration, what ZeRO 3 keeps on a rank, and loading a base in shards."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

# Smaller parameters stay whole on every rank under ZeRO 3.
_PERSISTENT = 10_000
# Under ZeRO 3, parameters that may be whole at once, and of them those fetched together; DeepSpeed's own defaults.
_LIVE = 1_000_000_000
_FETCH = 50_000_000


def base_config(zero_stage: int, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration of an engine around a base that does not train."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": zero_stage,
            "stage3_param_persistence_threshold": _PERSISTENT,
            "stage3_max_live_parameters": _LIVE,
            "stage3_max_reuse_distance": _LIVE,
            "stage3_prefetch_bucket_size": _FETCH,
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 1_000_000_000,
    }


@contextlib.contextmanager
def loading_in_shards(dtype: torch.dtype) -> Iterator[None]:
    """Let ``from_pretrained`` keep this rank's share of each parameter alone, from the moment it is made.

    All ranks load together: rank 0 reads the file and the others get their shares from it.
    """
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist.get_backend(), verbose=False)
    # transformers asks a weak reference for it, and must not after the loading: generation has its own lockstep.
    config = HfDeepSpeedConfig(base_config(3, dtype))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        unset_hf_deepspeed_config()
        del config


def shard_bytes(model: nn.Module, world: int) -> int:
    """Bytes of the base that each of ``world`` ranks keeps under ZeRO 3: its equal share of every parameter."""
    return sum(-(-p.numel() // world) * p.element_size() for p in model.parameters())


def gathered_bytes(model: nn.Module) -> int:
    """Bytes that a rank needs at most, beside its shard, for parameters that are whole for a while under ZeRO 3:
    those that may live at once and the layer at work, and once more those of the largest message."""
    sizes = [(p.numel(), p.element_size()) for p in model.parameters()]
    total, element = sum(numel for numel, _ in sizes), max(element for _, element in sizes)
    largest = max(numel for numel, _ in sizes)
    persistent = sum(numel for numel, _ in sizes if numel <= _PERSISTENT)
    return (min(total, persistent + _LIVE + largest) + min(total, max(_FETCH, largest))) * element


def import_deepspeed() -> Any:
    """The module, told not to compile anything at start-up, and quiet."""
    import deepspeed

    # Its shared-memory all-reduce is compiled at start-up (a minute, and a killed build leaves a lock on which
    # every later run waits); gloo serves as well, and nothing here all-reduces large tensors on a CPU.
    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
    if "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def ensure_group(device: torch.device) -> None:
    """DeepSpeed wants a process group, and a rank from the launcher, even around a single process."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        # As start_ranks does: gloo scatters no sums of a GPU's tensors.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
