"""One job: its configuration, its processes, and what several stages share (tasks, base model, pool, run).

Everything is made on first use, so that a stage can check its input before anything is written, and the
quickstart, which runs all stages in one launch, loads the base once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from glider_dist.config import OFFLINE_DEFAULT, Config, RouterConfig
from glider_dist.errors import GliderError
from glider_dist.model.attach import attach_pool
from glider_dist.model.base import BaseModel, choose_dtype, load_base, prepare_base
from glider_dist.model.batch import Collator
from glider_dist.model.engine import FrozenBase
from glider_dist.model.sites import fingerprint
from glider_dist.parallel.launch import ranks_on_node
from glider_dist.parallel.mesh import Mesh, init_mesh
from glider_dist.parallel.placement import Placement, place
from glider_dist.parallel.ranks import Ranks
from glider_dist.parallel.stopping import StopWish
from glider_dist.pool import ExpertPool, Fingerprint
from glider_dist.semantics.source import EmbedderSource
from glider_dist.tasks.source import TaskSuite, load_tasks
from glider_dist.tracking.run import Run, check_run_dir, known_wandb_id
from glider_dist.tracking.state import release
from glider_dist.training.checkpoint import Checkpoints, wandb_id_of

log = logging.getLogger(__name__)


def with_base(cfg: Config) -> Config:
    """The configuration with a base instead of ``auto``: the pool's if there is one.

    Raises:
        GliderError: ``pool.json`` is broken.
    """
    if cfg.base != "auto":
        return cfg
    base = OFFLINE_DEFAULT
    if cfg.pool is not None and (Path(cfg.pool) / "pool.json").exists():
        base = ExpertPool.open(cfg.pool).base
        log.info("base %s: pool %s was made for it", base, cfg.pool)
    return dataclasses.replace(cfg, base=base)


class Job:
    """See the module. ``run_dir`` is ``cfg.run_dir`` or ``runs/STAGE``; ``cfg.base`` is never ``auto``."""

    def __init__(self, cfg: Config, stage: str, ranks: Ranks, stop: StopWish | None = None):
        cfg.validate()
        self._base_given = cfg.base != "auto"
        self.cfg = cfg = with_base(cfg)
        self.stage = stage
        self.ranks = ranks
        self.stop = stop or StopWish(cfg.max_minutes, ranks)
        self.run_dir = Path(cfg.run_dir or f"runs/{stage}")
        self._base_hash: str | None = None
        ranks.check_agreement("configuration", f"{stage}\n{OmegaConf.to_yaml(OmegaConf.structured(cfg))}")

    @cached_property
    def tasks(self) -> TaskSuite:
        return load_tasks(self.cfg.tasks, self.cfg.seed)

    @cached_property
    def base(self) -> BaseModel:
        sharded = self.cfg.zero_stage == 3 and self.ranks.world > 1
        try:
            base = self._load_base(sharded)
        except GliderError as error:
            if self._base_given or self.cfg.pool is None or not (self.pool_path / "pool.json").exists():
                raise
            raise GliderError(f"{error} ({self.open_pool(check_base=False).base_origin})") from error
        log.info("base %s on %s, %s", base.source, base.device, base.reason)
        self._base_hash = self._hash_of(base, sharded)
        return base

    def _load_base(self, sharded: bool) -> BaseModel:
        cfg, device = self.cfg, str(self.ranks.device)
        if sharded:
            with self.main_first():
                prepare_base(cfg.base)
            return load_base(cfg.base, cfg.dtype, device, sharded=True)
        with self.main_first():
            return load_base(cfg.base, cfg.dtype, device, cfg.base_bits)

    def _hash_of(self, base: BaseModel, sharded: bool) -> str | None:
        """Read once: by rank 0 if it alone reads the base, else by the first rank of each node."""
        ranks = self.ranks
        nodes = ranks.gather("" if sharded else socket.gethostname())
        reader = nodes.index(nodes[ranks.rank])
        return ranks.gather(base.weights_hash if ranks.rank == reader else None)[reader]

    @property
    def computes_in(self) -> list[str | int | None]:
        """Dtype, bits of the linear layers (None: all of the dtype's) and device of the base, loaded or not."""
        dtype, _ = choose_dtype(self.cfg.dtype, self.ranks.device)
        return [str(dtype), self.cfg.base_bits, self.ranks.device.type]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Taken before experts or DeepSpeed change the model's modules."""
        model = self.base.model  # with which the hash comes
        return fingerprint(model, self._base_hash)

    @cached_property
    def frozen(self) -> FrozenBase:
        _ = self.fingerprint
        return FrozenBase(self.base, self.ranks, self.cfg.zero_stage)

    @cached_property
    def mesh(self) -> Mesh | None:
        """How the ranks share the experts; None in a single process."""
        return init_mesh(self.cfg.mesh.expert_parallel)

    def attach(self, pool: ExpertPool, router: RouterConfig, dtype: torch.dtype | None = None) -> Any:
        """Attach the pool to the base, its experts shared by the mesh; returns the model (see ``attach_pool``)."""
        mesh, placement = self.mesh, None
        if mesh is not None and mesh.expert_parallel > 1:
            placement = self._placement(pool, mesh.expert_parallel)
        return attach_pool(self.frozen.model, pool, router, mesh, self.cfg.dispatch, dtype, placement)

    def _placement(self, pool: ExpertPool, ranks: int) -> Placement:
        """As stored in the run directory if it was made as configured, else made so and stored there."""
        path, mesh = self.run_dir / "placement.json", self.cfg.mesh

        def make() -> Placement:
            before = Placement.load(path) if path.exists() else None
            if before is not None and before.is_made(pool.names, ranks, mesh.placement, mesh.load):
                return before.of(pool.names)
            made = place(pool.names, ranks, mesh.placement, mesh.load)
            made.save(path)
            was = f" (before: {before.origin})" if before is not None else ""
            log.info("placement of the experts: %s%s\n%s", made.origin, was, made)
            return made

        return self.ranks.made_on_main(make)

    @cached_property
    def collator(self) -> Collator:
        return Collator(self.base, self.cfg.tasks.max_length)

    @cached_property
    def embedder(self) -> EmbedderSource:
        """The embedder of the global router, here or behind a service; all ranks ask for it together."""
        return EmbedderSource(self.cfg, self.ranks)

    @cached_property
    def run(self) -> Run:
        """The run directory; the first use writes it."""
        config = OmegaConf.to_container(OmegaConf.structured(self.cfg), resolve=True)
        assert isinstance(config, dict)
        dtype, reason = choose_dtype(self.cfg.dtype, self.ranks.device)
        return Run.start(
            self.run_dir,
            {str(k): v for k, v in config.items()},
            self.stage,
            self.cfg.tracking,
            self.ranks.is_main,
            {
                "device": str(self.ranks.device),
                "dtype": str(dtype).removeprefix("torch."),
                "dtype_reason": reason,
                "ranks": self.ranks.world,
                "ranks_per_node": ranks_on_node(os.environ, self.ranks.world),
            },
            # A copy of the checkpoints alone is enough to go on with the same run.
            lambda: wandb_id_of(self.run_dir / "checkpoints"),
        )

    def checkpoints(self, kind: str, keep_last: int = 2) -> Checkpoints:
        """What is kept of unfinished training: ``kind`` is expert, gate, joint or a folder below."""
        folder = self.run_dir / "checkpoints" / kind
        return Checkpoints(folder, keep_last, lambda: known_wandb_id(self.run_dir))

    def check_run_dir(self) -> None:
        """Raises GliderError on every rank if rank 0 cannot write the run directory. Nothing is written yet."""
        self.ranks.on_main(lambda: check_run_dir(self.run_dir))

    @property
    def pool_path(self) -> Path:
        """Raises GliderError if no pool is named."""
        if self.cfg.pool is None:
            raise GliderError(f"{self.stage} needs a pool; add pool=FOLDER")
        return Path(self.cfg.pool)

    def open_pool(self, check_base: bool = True) -> ExpertPool:
        """The pool as it is on disk now; raises GliderError if it is missing or for another base."""
        pool = ExpertPool.open(self.pool_path)
        if check_base:
            pool.check_base(self.fingerprint)
        return pool

    def create_pool(self) -> ExpertPool:
        """Open the pool, or make it for this base; safe when all ranks do it at once."""
        mine = self.fingerprint  # for which all ranks load the base
        pool = self.ranks.made_on_main(lambda: ExpertPool.create(self.pool_path, self.cfg.base, mine))
        pool.check_base(mine)
        return pool

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let rank 0 fill shared caches before the others look into them."""
        if not self.ranks.is_main:
            self.ranks.barrier()
        try:
            yield
        finally:
            if self.ranks.is_main:
                self.ranks.barrier()

    def fail(self, error: Exception) -> None:
        """Note in the run directory, if there is one, why the job ends."""
        self._end("failed", str(error) or type(error).__name__)

    def _end(self, state: str, reason: str) -> None:
        if "run" in self.__dict__:
            self.run.finish(state, reason)
        release(self.run_dir)

    def close(self, state: str = "done", reason: str = "") -> None:
        """End tidily, together with the other ranks."""
        self._end(state, reason)
        self.ranks.close()
        if "embedder" in self.__dict__:
            self.embedder.close()
