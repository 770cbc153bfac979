"""What a launcher gives a process: its place among the ranks, its GPU and its files.

``srun`` tells it in words of its own; torch's are RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

Slurm names no meeting place. Ours is the first node of the step, where rank 0 runs, and a port that follows from
the job and the step, so that jobs that share a node do not meet.
"""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Mapping, MutableMapping

from glider_dist.errors import GliderError

# Below the ports that Linux gives to outgoing connections (from 32768), above those of usual services.
_FIRST_PORT, _PORTS = 10240, 22500
_STEPS = 5  # of one job at a time; jobs whose ids differ by less than 4,500 never share a port


def adopt_slurm(env: MutableMapping[str, str]) -> None:
    """Set what torch wants where ``srun`` started this process as one of several, and no launcher has.

    Only a step counts: the batch script itself, which has SLURM_PROCID too, is no rank.

    Raises:
        GliderError: the step's variables are not as Slurm documents them.
    """
    world = env.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in env or world == "1" or "SLURM_PROCID" not in env:
        return
    try:
        per_node = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
        env["LOCAL_WORLD_SIZE"] = str(per_node[int(env["SLURM_NODEID"])])
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(port_of(int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"]))))
    except (KeyError, ValueError, IndexError) as error:
        raise GliderError(
            f"srun's variables SLURM_* cannot be read ({error!r}); start the ranks with srun"
        ) from None
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], world


def ranks_on_node(env: Mapping[str, str], world: int) -> int:
    """How many of the job's ranks run here, as torchrun, srun or another launcher says; else all."""
    return min(int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world), world)


def visible_gpu(env: MutableMapping[str, str], local_rank: int, local_world: int, visible: int) -> int:
    """The GPU of a rank among those that it sees.

    Where Slurm binds one GPU to each task (``--gpus-per-task``), each sees its own alone, as number 0; LOCAL_RANK,
    by which DeepSpeed chooses, then becomes 0.

    Raises:
        GliderError: there are fewer GPUs than ranks.
    """
    if local_rank < visible:
        return local_rank
    on_node = env.get("SLURM_GPUS_ON_NODE", "")
    if visible == 1 and on_node.isdecimal() and int(on_node) >= local_world:
        env["LOCAL_RANK"] = "0"
        return 0
    raise GliderError(
        f"rank {env.get('RANK', '0')} needs GPU {local_rank} of its node, but sees {visible}; start fewer ranks, "
        "or see what hides the others (CUDA_VISIBLE_DEVICES, --gpu-bind)"
    )


def first_host(nodes: str) -> str:
    """The first host of a Slurm host list: ``gpu[03-05,9]-ib[0-1],login`` gives ``gpu03-ib0``.

    Raises:
        ValueError: it is no host list.
    """
    # The first comma outside of brackets ends the first name.
    found = re.match(r"(?:[^\[\],\s]|\[\d[\d,-]*\])+", nodes)
    if found is None:
        raise ValueError(f"no host list: {nodes!r}")
    return re.sub(r"\[(\d+)[\d,-]*\]", r"\1", found.group())


def tasks_per_node(text: str) -> list[int]:
    """``2(x3),1`` gives ``[2, 2, 2, 1]``. Raises ValueError if it is of another form."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"no task counts: {text!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def port_of(job: int, step: int) -> int:
    """The port where the ranks of a job's step meet."""
    return _FIRST_PORT + (job * _STEPS + step % _STEPS) % _PORTS


def open_many_files() -> int:
    """Let this process open as many files as it may; returns how many.

    Each expert that is written holds a lock, each rank a connection to every other, and a service one to each
    client: together more than the usual 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
