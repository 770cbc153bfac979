"""A mistake is told once, however many ranks see it, and every rank ends with exit code 2.

The ranks agree through the key-value store of their launch, which needs no process group: the first to arrive
tells. A rank whose collectives break because another one has left finds there that the mistake is told.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from datetime import timedelta
from typing import Any

from glider_dist.errors import GliderError
from glider_dist.parallel.launch import adopt_slurm

_SECONDS = 5.0  # rank 0 may hold the store, so it stays until the others have looked, if they come


def _launch() -> str:
    """Stands for this launch: ranks of another one may reach this store, since launchers have a usual port."""
    env = os.environ
    world = env.get("WORLD_SIZE")
    job = [env.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID")]
    # The ranks of one node have one parent; those of several nodes, or that srun itself has started (each in a
    # container of its own perhaps), share the number of their job and step alone.
    of_srun = env.get("SLURM_STEP_NUM_TASKS") == world
    alone = not of_srun and (env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world) == world
    return "-".join([*job, str(os.getppid() if alone else "")])


def _key(name: str) -> str:
    return f"glider_dist/mistake/{_launch()}/{name}"


def tell(message: str) -> int:
    """Print ``message`` to stderr unless another rank has told a mistake; returns the exit code 2.

    A mistake that rank 0 does not see is told with the rank that does.
    """
    rank, world = _place()
    store = _store(10.0) if world > 1 else None
    if store is not None and rank == 0:
        store.set(_key("of_rank_0"), "")
    # Without a store nobody knows who has told, so everybody tells.
    if store is None or store.add(_key("told"), 1) == 1:
        alone = rank > 0 and not (store is not None and _comes(store, _key("of_rank_0")))
        print(f"glider-dist: error: {f'rank {rank}: ' if alone else ''}{message}", file=sys.stderr, flush=True)
        if store is not None:
            store.set(_key("said"), "")
    else:
        # A launcher that sees this rank end may kill the one that is about to tell.
        _comes(store, _key("said"), 3.0)
    if store is not None:
        _leave()
        store.add(_key("left"), 1)
        until = time.monotonic() + _SECONDS
        while rank == 0 and store.add(_key("left"), 0) < world and time.monotonic() < until:
            time.sleep(0.05)
    return 2


def told_elsewhere() -> bool:
    """Whether another rank has told a mistake; this one then has nothing to add."""
    if _place()[1] == 1 or "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    store = _store(3.0) if dist.is_initialized() else None
    if store is None or store.add(_key("told"), 0) == 0:
        return False
    _comes(store, _key("said"), 3.0)
    store.add(_key("left"), 1)
    return True


def _place() -> tuple[int, int]:
    # A mistake may come before the ranks have met; a broken set-up is what is being told then.
    with contextlib.suppress(GliderError):
        adopt_slurm(os.environ)
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def _store(seconds: float) -> Any:
    """The store under MASTER_ADDR and MASTER_PORT, or None if the other ranks do not come in time."""
    import torch.distributed as dist

    try:
        return next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))[0]
    except (RuntimeError, ValueError, OSError):
        return None


def _comes(store: Any, key: str, seconds: float = 1.0) -> bool:
    until = time.monotonic() + seconds
    while not (there := store.check([key])) and time.monotonic() < until:
        time.sleep(0.05)
    return bool(there)


def _leave() -> None:
    """Close this rank's connections, so that ranks that wait for it wake up while the store is still there."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
        gc.collect()  # the connections close with the last reference to them
