"""A step of joint training by ZeRO stage and dispatch, against one process and against replicated experts.

``glider-dist bench joint [--ranks N] [run_dir=FOLDER]``: SmolLM2-135M, random experts of rank 16 on every linear
layer, a global batch of random tokens, experts and gates training, top-2. Every way's first loss is checked
against that of one process. N gloo ranks of one thread each on this machine; the one process has one thread, too.
"""

from __future__ import annotations

import logging
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glider_dist.bench.timing import save, table
from glider_dist.config import Config, MeshConfig, RouterConfig, TrainConfig
from glider_dist.errors import GliderError
from glider_dist.model.attach import attach_pool, context_of, detach, query_scores
from glider_dist.model.base import load_base
from glider_dist.model.batch import Collator, Encoded
from glider_dist.model.engine import FrozenBase
from glider_dist.parallel.exchange import count_traffic
from glider_dist.parallel.local_ranks import LocalRanks, joined_ranks
from glider_dist.parallel.mesh import init_mesh
from glider_dist.pool import ExpertPool
from glider_dist.testing import random_pool
from glider_dist.training.batches import packing_for
from glider_dist.training.deepspeed_moe import ExpertEngine
from glider_dist.training.joint_batches import Row
from glider_dist.training.joint_config import deepspeed_config, recipes_of
from glider_dist.training.joint_loop import JointLoop
from glider_dist.training.joint_params import Trained
from glider_dist.training.joint_routing import RouterExtras

log = logging.getLogger(__name__)
BASE, RANK, EXPERTS, ROWS, LOW, HIGH, STEPS = "smollm2-135m", 16, 8, 16, 24, 72, 4
ROUTER = RouterConfig(kind="phatgoose", top_k=2)


@dataclass(frozen=True)
class Way:
    """One row of the table."""

    name: str
    ranks: int
    zero_stage: int
    expert_parallel: int = 1
    dispatch: str = "auto"


def ways(ranks: int) -> list[Way]:
    shared = [Way(f"ZeRO {stage}", ranks, stage, ranks) for stage in (0, 1, 3)]
    return [
        Way("one process, all experts", 1, 0),
        Way("replicated experts, ZeRO 2", ranks, 2),
        *[Way("ZeRO 2", ranks, 2, ranks, dispatch) for dispatch in ("all_to_all", "gather", "auto")],
        *shared,
    ]


def rows_of(step: int, vocabulary: int) -> list[Row]:
    draw = random.Random(step)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(count))

    return [Row("", Encoded(tokens(draw.randint(LOW, HIGH)), tokens(4)), place) for place in range(ROWS)]


def measure(way: Way, path: str, base_id: str) -> dict[str, Any]:
    """On every rank: the first loss, seconds and bytes of each further step, and what this rank keeps."""
    ranks = joined_ranks()
    base = load_base(base_id, "auto", "cpu")
    frozen = FrozenBase(base, ranks, way.zero_stage)
    # ZeRO 0 cannot clip where ranks share the experts.
    train = TrainConfig(max_grad_norm=1.0 if way.zero_stage else 0.0, max_steps=STEPS, batch_size=ROWS)
    cfg = Config(zero_stage=way.zero_stage, mesh=MeshConfig(expert_parallel=way.expert_parallel), train=train)
    pool = ExpertPool.open(path)
    attach_pool(base.model, pool, ROUTER, init_mesh(way.expert_parallel), way.dispatch, torch.float32)
    context = context_of(base.model)
    owned: Sequence[int] = range(len(pool))
    if context.dispatch is not None:
        owned = context.dispatch.placement.owned(context.dispatch.mesh.expert_rank)
    trained = Trained(context, owned, [], experts=True, gates=True)
    config = deepspeed_config(cfg, ranks.world, train.learning_rate, trained.elements)
    engine = ExpertEngine(trained.experts, trained.gates, way.expert_parallel, config)
    extras = RouterExtras(cfg.joint, 0, ROUTER.top_k, len(context.banks))
    packing = packing_for(base.device, base.model, None, None)

    def scope(rows: Sequence[Row]) -> Any:
        return query_scores(base.model, torch.zeros(max(1, len(rows)), len(pool)))

    loop = JointLoop(base.model, Collator(base, 512), engine, trained, scope, recipes_of(cfg), packing, extras)
    first, seconds, sent, loopback = 0.0, [], 0, 0
    for step in range(STEPS):
        dist.barrier()
        before, started = _loopback(), time.perf_counter()
        with count_traffic() as traffic:
            found = loop.step(rows_of(step, base.model.config.vocab_size))
        dist.barrier()
        if step == 0:
            first = found.loss
        else:
            seconds.append(time.perf_counter() - started)
            sent, loopback = sum(traffic.sent.values()), _loopback() - before
    kept = {**engine.local_bytes, "base": frozen.local_bytes}
    detach(base.model)
    return {"loss": first, "seconds": seconds, "sent": sent, "loopback": loopback, "kept": kept}


def _loopback() -> int:
    """Bytes that this machine has sent to itself so far; 0 where the system does not tell."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")), 0)


def run(folder: Path, ranks: int, base_id: str = BASE) -> list[dict[str, Any]]:
    """Print the table and save it.

    Raises:
        GliderError: a way's first loss is not that of one process.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch) / "pool")
        random_pool(path, load_base(base_id, "auto", "cpu").model, EXPERTS, rank=RANK, base=base_id)
        losses: list[float] = []
        for way in ways(ranks):
            with LocalRanks(way.ranks, timeout_s=1800.0) as processes:
                found = processes.run(measure, way, path, base_id)
            losses.append(found[0]["loss"])
            if abs(losses[-1] / losses[0] - 1) > 0.01:
                raise GliderError(
                    f"{way}: the loss is {losses[-1]}, that of one process {losses[0]}; this is a bug"
                )
            rows.append(_row(way, found))
            log.info("%s, %s: %.2f s a step", way.name, way.dispatch, rows[-1]["s/step"])
    print(table(rows), flush=True)
    about = {
        "base": base_id,
        "experts": EXPERTS,
        "rank": RANK,
        "rows": ROWS,
        "tokens": [LOW, HIGH],
        "ranks": ranks,
    }
    save(folder, "joint", rows, about)
    return rows


def _row(way: Way, found: list[dict[str, Any]]) -> dict[str, Any]:
    slowest = [max(each) for each in zip(*(one["seconds"] for one in found), strict=True)]
    most = {key: max(one["kept"][key] for one in found) / 1e6 for key in found[0]["kept"]}
    return {
        "way": way.name,
        "EP": way.expert_parallel,
        "dispatch": way.dispatch if way.expert_parallel > 1 else "-",
        "s/step": statistics.median(slowest),
        "dispatch MB/rank": max(one["sent"] for one in found) / 1e6,
        "all MB/rank": found[0]["loopback"] / 1e6 / way.ranks,
        "experts MB": most["parameters"],
        "optimizer MB": most["optimizer"],
        "base MB": most["base"],
    }
