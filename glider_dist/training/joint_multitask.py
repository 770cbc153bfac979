"""The multitask baseline: one LoRA trained on the union of the held-in tasks, without a router.

It is trained by the loop of joint training, under the same stages, and stored as the only expert of a pool of its
own, in which ``evaluate.routers=[oracle]`` serves every query by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from glider_dist.errors import GliderError
from glider_dist.job import Job
from glider_dist.lora.bank import initial_site, padded_rank
from glider_dist.model.attach import assign_experts, install
from glider_dist.model.sites import linear_sites, peft_targets
from glider_dist.pool.adapter import write_adapter
from glider_dist.training.joint_batches import Row
from glider_dist.training.joint_params import Trained
from glider_dist.training.joint_state import Tensors

NAME = "multitask"


def check_pool(job: Job) -> bool:
    """Whether the pool has the expert already.

    Raises:
        GliderError: it has other experts, which would be routed to beside it, or ranks shall share the one expert.
    """
    if job.cfg.mesh.expert_parallel > 1:
        raise GliderError("joint.multitask trains one expert, which ranks cannot share: mesh.expert_parallel=1")
    if not (job.pool_path / "pool.json").exists():
        return False
    pool = job.open_pool(check_base=False)
    if other := [name for name in pool.names if name != NAME]:
        raise GliderError(
            f"pool {pool.path} has experts such as {other[0]!r}, beside which {NAME!r} would be routed to; "
            "give joint.multitask a pool of its own"
        )
    return NAME in pool


def install_fresh(job: Job) -> Trained:
    """Put a fresh expert into the base; it trains."""
    lora, model = job.cfg.lora, job.frozen.model
    dtype = torch.promote_types(job.base.dtype, torch.float32)
    banks = {}
    for site, found in linear_sites(model, lora.targets).items():
        bank = initial_site([NAME], site, found.shape, lora.rank, lora.alpha, job.cfg.seed)
        room = padded_rank(lora.rank) - lora.rank
        bank.A, bank.B = (torch.nn.functional.pad(each, (0, 0, 0, room)) for each in (bank.A, bank.B))
        bank.ranks = (lora.rank,)
        banks[site] = bank.to(job.base.device, dtype)
    context = install(model, (NAME,), banks, {})
    return Trained(context, [0], [], experts=True, gates=False)


def scope(model: Any, rows: Sequence[Row]) -> Any:
    """Every query is served by the one expert."""
    return assign_experts(model, torch.zeros(max(1, len(rows)), dtype=torch.int64))


def store(job: Job, found: dict[str, Tensors], card: dict[str, Any]) -> None:
    """Add the expert to the pool; on the rank that has its weights."""
    tensors = found[NAME]
    lora = job.cfg.lora
    chosen = linear_sites(job.base.model, lora.targets)
    weights = {site: (tensors[f"{site}.A"], tensors[f"{site}.B"].t()) for site in chosen}
    task_type = "SEQ_2_SEQ_LM" if job.collator.seq2seq else "CAUSAL_LM"
    targets = peft_targets(chosen, job.base.model)
    pool = job.open_pool()
    pool.write(
        NAME,
        lambda folder: write_adapter(folder, weights, lora.alpha, targets, pool.base, task_type),
        {"task": NAME, "joint": [card], "scores": {"validation_loss": card["validation_loss"]}},
    )
