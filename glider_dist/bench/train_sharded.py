"""Co-training over a replicated base and over one that ZeRO 3 shards: time, and what a rank keeps."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch.distributed as dist

from glider_dist.bench.timing import table
from glider_dist.bench.train import BASE, Bench, trainee
from glider_dist.errors import GliderError
from glider_dist.parallel.local_ranks import LocalRanks, joined_ranks

RANKS, EXPERTS, STEPS, BATCH, ROUNDS = 2, 4, 4, 8, 3


def run(base: str = BASE) -> list[dict[str, Any]]:
    """Print a row for each way. Two ranks of one thread each, with four experts of their own.

    Raises:
        GliderError: the losses differ, which would be a bug.
    """
    rows: list[dict[str, Any]] = []
    losses = []
    for name, stage in (("replicated", 0), ("ZeRO 3", 3)):
        with LocalRanks(RANKS, timeout_s=1800.0) as processes:
            found = processes.run(measure, stage, base)
        losses.append(statistics.mean(one["loss"] for one in found))
        if abs(losses[-1] / losses[0] - 1) > 0.01:
            raise GliderError(f"{name}: the mean loss is {losses[-1]}, replicated {losses[0]}; this is a bug")
        slowest = [max(each) for each in zip(*(one["seconds"] for one in found), strict=True)]
        rows.append(
            {
                "base": name,
                "s/step": statistics.median(slowest) / STEPS,
                "base MB/rank": max(one["base"] for one in found) / 1e6,
                "experts MB/rank": max(one["experts"] for one in found) / 1e6,
            }
        )
    print(
        f"\n{RANKS} ranks, {EXPERTS} experts each, steps of {BATCH} rows an expert\n{table(rows)}",
        flush=True,
    )
    return rows


def measure(zero_stage: int, base: str) -> dict[str, Any]:
    """On one rank."""
    ranks = joined_ranks()
    bench = Bench(ranks, zero_stage, base)
    seconds, loss, experts = [], 0.0, 0
    for repeat in range(-1, ROUNDS):
        mine = [trainee(f"{ranks.rank}.{index}", STEPS, BATCH) for index in range(EXPERTS)]
        dist.barrier()
        started = time.perf_counter()
        loop = bench.train(mine, EXPERTS)
        dist.barrier()
        if repeat >= 0:
            seconds.append(time.perf_counter() - started)
        loss = statistics.mean(each.progress.losses[-1] for each in mine)
        experts = EXPERTS * (loop.slots.bytes_per_expert + loop.optimizer.bytes_per_expert)
    return {"seconds": seconds, "base": bench.frozen.local_bytes, "experts": experts, "loss": loss}
