"""Run functions on N processes of this machine that form one gloo group: for tests and benchmarks.

Starting processes and importing torch takes seconds, so the processes stay and take one function after another.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glider_dist.errors import GliderError
from glider_dist.parallel.ranks import Ranks, keep_memory

_START_S = 600.0
"""Importing torch in N processes takes a loaded machine long."""
_GRACE_S = 60.0
"""What a rank needs to say that a collective timed out, and why."""
_AFTER_FAILURE_S = 20.0
"""How long the others may take to fail as well."""


class LocalRanks:
    """N ranks on gloo over loopback, one thread each.

    Example::

        with LocalRanks(2) as ranks:
            results = ranks.run(work, argument)  # work(argument) on each rank; results in order of rank

    Args:
        world: number of processes.
        timeout_s: how long a function, and any collective in it, may take, not counting the start.
    """

    def __init__(self, world: int, timeout_s: float = 120.0):
        self.world = world
        self.timeout_s = timeout_s
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a module-level function with the same arguments on every rank.

        Returns:
            What each rank returned, in order of rank.

        Raises:
            GliderError: a rank failed (its traceback is in the message), ended, or took longer than the time-out;
                all processes are then ended, and the next call starts new ones.
        """
        try:
            if not self._processes:
                self._start()
                self._answers(_START_S)
            for pipe in self._pipes:
                pipe.send((function, args))
            return self._answers(self.timeout_s + _GRACE_S)
        except BaseException:
            # Whatever it was, answers may still be under way; they must not be taken for those of the next call.
            self.close()
            raise

    def _answers(self, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failed: dict[int, str] = {}
        while len(results) + len(failed) < self.world:
            left = {rank: pipe for rank, pipe in enumerate(self._pipes) if rank not in {*results, *failed}}
            ready = wait(list(left.values()), _AFTER_FAILURE_S if failed else timeout_s)
            if not ready:
                break
            for rank, pipe in left.items():
                if pipe not in ready:
                    continue
                try:
                    good, value = pipe.recv()
                except EOFError:
                    good, value = False, "the process ended"
                (results if good else failed)[rank] = value
        if len(results) == self.world:
            return [results[rank] for rank in range(self.world)]
        silent = [rank for rank in range(self.world) if rank not in results and rank not in failed]
        texts = [f"rank {rank}: {text}" for rank, text in sorted(failed.items())]
        texts += [f"rank {rank}: no answer within {timeout_s:g} s" for rank in silent]
        raise GliderError("\n".join(texts))

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="glider-ranks-")
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world, str(Path(self._folder.name) / "store"), self.timeout_s, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def joined_ranks() -> Ranks:
    """On one of the :class:`LocalRanks`: this process as a stage sees it, ready for DeepSpeed."""
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(rank))
    return Ranks(rank, world, torch.device("cpu"), dist.group.WORLD)


def _serve(rank: int, world: int, store: str, timeout_s: float, pipe: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    keep_memory()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=_START_S),
    )
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))
    pipe.send((True, None))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
