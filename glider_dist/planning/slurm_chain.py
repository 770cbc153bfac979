"""Which batch jobs a pipeline takes, and which waits for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.pool import ExpertPool
from glider_dist.tasks.source import load_tasks

ARRAYS = ("train-experts", "train-gates")
ONE_RANK = ("fetch", "describe", "index")
EMBEDDING = ("calibrate", "evaluate", "train-joint")


@dataclass(frozen=True)
class Link:
    """One job of the chain.

    Attributes:
        nodes, ranks: nodes, and ranks per node.
        shards: members of its array; empty if it is one job.
        after: the job it waits for; None: none.
        matching: each member waits for its counterpart alone.
        service: an embedding service runs beside the ranks.
    """

    stage: str
    nodes: int
    ranks: int
    shards: tuple[int, ...] = field(default=())
    after: str | None = None
    matching: bool = False
    service: bool = False


def make_chain(cfg: Config, known: Sequence[str], ranks: int) -> list[Link]:
    """The jobs in order of submission. Arrays name the shards that lack an expert or a gate; without any, the
    array is left out.

    Args:
        known: stages that there are.
        ranks: per node.

    Raises:
        GliderError: a stage is unknown or named twice, or the tasks cannot be read.
    """
    chain: list[Link] = []
    for stage in cfg.slurm.stages:
        if stage not in known:
            raise GliderError(f"slurm.stages names {stage!r}; the stages are {', '.join(known)}")
        if any(link.stage == stage for link in chain):
            raise GliderError(f"slurm.stages names {stage!r} twice; name it once")
        before = chain[-1] if chain else None
        after = before.stage if before else None
        if stage in ARRAYS:
            shards = _lacking(cfg, gates="train-gates" in cfg.slurm.stages)
            if not shards:
                continue
            if cfg.slurm.shards == 1:
                shards = ()
            matching = bool(shards) and before is not None and before.shards == shards
            chain.append(Link(stage, cfg.slurm.nodes, ranks, shards, after, matching))
        elif stage in ONE_RANK:
            chain.append(Link(stage, 1, 1, after=after))
        else:
            service = stage in EMBEDDING and cfg.slurm.service and cfg.service.url is None
            several = cfg.slurm.nodes * ranks > 1
            chain.append(Link(stage, cfg.slurm.nodes, ranks, after=after, service=service and several))
    if not chain:
        raise GliderError("there is nothing to submit: the pool has every expert and gate")
    return chain


def _lacking(cfg: Config, gates: bool) -> tuple[int, ...]:
    """Shards of the held-in tasks with an expert, or (if asked for) a gate, that the pool does not have."""
    names = [task.name for task in load_tasks(cfg.tasks, cfg.seed).held_in]
    path = Path(cfg.pool or "")
    pool = ExpertPool.open(path) if (path / "pool.json").exists() else None
    done = {
        name for name in names if pool is not None and name in pool and (pool.expert(name).has_gate or not gates)
    }
    shards = cfg.slurm.shards
    return tuple(shard for shard in range(shards) if not done.issuperset(names[shard::shards]))
