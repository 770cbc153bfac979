"""The processes of a job: who this one is, its device, its threads, and small messages between all of them.

Works under the ``deepspeed`` launcher, ``torchrun``, ``srun`` and as a single process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from glider_dist.errors import GliderError
from glider_dist.parallel.launch import adopt_slurm, open_many_files, ranks_on_node, visible_gpu

log = logging.getLogger(__name__)
T = TypeVar("T")

_PATIENCE = timedelta(days=28)
"""How long small messages wait: ranks that train on their own end hours apart, and one may fetch or describe for
all. A process that dies is noticed at once, as its connections close; one that hangs is the launcher's to end."""
_TENSOR_PATIENCE = timedelta(minutes=30)
"""How long a collective of tensors may wait before the job is ended."""


@dataclass(frozen=True)
class Ranks:
    """This process among the job's processes.

    Attributes:
        rank, world: position and number of processes.
        device: ``cuda:N`` with the position on this node, or ``cpu``.
        control: a gloo group for small messages; None in a single process.
    """

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, in order of rank, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value: T) -> T:
        """Rank 0's ``value`` on every rank, when all have come here: what they must decide alike, though a network
        file system may show another node's files later to some of them."""
        if self.control is None:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, 0, group=self.control, device=torch.device("cpu"))
        self.barrier()
        return cast(T, values[0])

    def on_main(self, work: Callable[[], Any]) -> None:
        """Run ``work`` on rank 0 while the others wait; a GliderError there is raised on all of them."""
        message = None
        if self.is_main:
            try:
                work()
            except GliderError as error:
                message = str(error)
        if message := self.gather(message)[0]:
            raise GliderError(message)

    def made_on_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, on every rank; what it wrote may not be seen on other nodes yet."""
        made: list[T] = []
        self.on_main(lambda: made.append(make()))
        return self.from_main(made[0] if made else cast(T, None))

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank at once; a GliderError on any is raised on all of them."""
        message, value = None, None
        try:
            value = work()
        except GliderError as error:
            message = str(error)
        for found in self.gather(message):
            if found:
                raise GliderError(found)
        return cast(T, value)

    def largest(self, value: int) -> int:
        """The largest ``value`` of all ranks."""
        if self.control is None:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def check_agreement(self, what: str, text: str) -> None:
        """Raises GliderError, naming the ranks, unless ``text`` is the same on all of them."""
        digests = self.gather(hashlib.sha256(text.encode()).hexdigest())
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise GliderError(
                f"rank {', '.join(map(str, odd))} has another {what} than rank 0; "
                "start all ranks with the same one"
            )

    def leave_word(self, key: str, word: str) -> None:
        """For every rank to find with :meth:`word_left`, whatever each is doing: no collective."""
        if self.world > 1:
            # The store died with rank 0 if it cannot be reached, of which the next collective tells.
            with contextlib.suppress(RuntimeError):
                dist.distributed_c10d._get_default_store().set(key, word)

    def word_left(self, key: str) -> str:
        """What any rank has left, or nothing."""
        with contextlib.suppress(RuntimeError):
            if self.world > 1 and (store := dist.distributed_c10d._get_default_store()).check([key]):
                return str(store.get(key).decode())
        return ""

    def close(self) -> None:
        if self.control is not None and dist.is_initialized():
            dist.barrier(group=self.control)
            dist.destroy_process_group()


ALONE = Ranks(0, 1, torch.device("cpu"), None)
"""A single process that computes nothing."""


def _environment() -> tuple[int, int, int, int]:
    env = os.environ
    adopt_slurm(env)
    world = int(env.get("WORLD_SIZE", "1"))
    return int(env.get("RANK", "0")), world, int(env.get("LOCAL_RANK", "0")), ranks_on_node(env, world)


def start_ranks(device: str = "auto") -> Ranks:
    """Read the launcher's environment, choose device and threads, and join the process group.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        GliderError: no GPU where one was asked for, fewer GPUs than ranks on this node, or the ranks do not meet.
    """
    rank, world, local_rank, local_world = _environment()
    open_many_files()
    cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    if device == "cuda" and not cuda:
        raise GliderError("device=cuda, but torch sees no GPU here; use device=cpu or a CUDA build of torch")
    if cuda:
        target = torch.device("cuda", visible_gpu(os.environ, local_rank, local_world, torch.cuda.device_count()))
        torch.cuda.set_device(target)
    else:
        target = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # which torch has read
            # The deepspeed launcher sets no thread count; two ranks on two cores would run four threads.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // local_world))
        keep_memory()
    control = None
    if world > 1:
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo", timeout=_TENSOR_PATIENCE, device_id=target if cuda else None
            )
        except dist.DistError as error:
            raise GliderError(_apart(rank, world, str(error))) from None
        control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Ranks(rank, world, target, control)


def _apart(rank: int, world: int, reason: str) -> str:
    address, port = (os.environ.get(key, "?") for key in ("MASTER_ADDR", "MASTER_PORT"))
    if "EADDRINUSE" in reason:
        return (
            f"port {port} is in use, perhaps by another job; start this one with --master_port and another number"
        )
    where, reason = f"{address}:{port}", " ".join(reason.split())[:200]
    return f"rank {rank} of {world} did not meet the others at {where} ({reason}); see whether rank 0 runs there"


def keep_memory() -> None:
    """Let glibc keep freed blocks instead of returning them: a fresh 10 MB tensor costs its page faults anew
    each time, which on a CPU is more than the elementwise work on it."""
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        # glibc before 2.35 refuses more than 32 MiB.
        if not libc.mallopt(mmap_threshold, 1 << 30):
            libc.mallopt(mmap_threshold, 1 << 25)
        libc.mallopt(trim_threshold, -1)  # never
    except (OSError, AttributeError):
        log.debug("mallopt is not available; memory is returned to the system as usual")
