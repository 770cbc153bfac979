"""Any number of ranks in one process: torch's fake process group, over which the real mesh makes its groups."""

from __future__ import annotations

import sys

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from glider_dist.parallel.mesh import Mesh, init_mesh


def meshes(world: int, expert_parallel: int) -> list[Mesh | None]:
    """What ``init_mesh`` makes on every rank of a world; ``[None]`` for a single process.

    Raises:
        GliderError: as :func:`glider_dist.parallel.mesh.init_mesh`.
    """
    if world == 1:
        return [init_mesh(expert_parallel)]
    return [_mesh(rank, world, expert_parallel) for rank in range(world)]


def _mesh(rank: int, world: int, expert_parallel: int) -> Mesh | None:
    hook = sys.excepthook  # to which every group adds its rank
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        return init_mesh(expert_parallel)
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
