"""Co-training that is broken off and goes on, as work for local ranks, and the same without any."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cotraining_worker as worker
import torch
import torch.distributed as dist

from glider_dist.errors import Stopped
from glider_dist.job import Job
from glider_dist.model.engine import FrozenBase
from glider_dist.parallel.ranks import ALONE, Ranks
from glider_dist.parallel.replicas import Replicas
from glider_dist.parallel.stopping import _KEY, StopWish
from glider_dist.pool import ExpertPool
from glider_dist.settings import read_config
from glider_dist.training import joint
from glider_dist.training.checkpoint import Checkpoints
from glider_dist.training.cotrain import CoTraining
from glider_dist.training.experts import train_experts, train_gates
from glider_dist.training.joint_loop import JointLoop
from glider_dist.training.order import share_out
from glider_dist.training.trainee import Trainee
from glider_dist.training.unfinished import Interval, Unfinished, facts_of

STAGES = {"train-experts": train_experts, "train-gates": train_gates, "train-joint": joint.run}


class Killed(BaseException):
    """Stands for the end of a process in a test that goes on."""


def here() -> Ranks:
    """This local rank, or a single process."""
    if not dist.is_initialized():
        return ALONE
    rank, world = dist.get_rank(), dist.get_world_size()
    # As a launcher does, for DeepSpeed.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    return Ranks(rank, world, torch.device("cpu"), dist.group.WORLD)


class Patient(Unfinished):
    """Waits for each save, so that a test knows which is the last one; otherwise one may be left out."""

    def due(self) -> bool:
        self.background.wait()
        return super().due()


def keeper(folder: Path, names: Sequence[str], ranks: Ranks, **recipe: Any) -> Unfinished:
    """Saves after every turn."""
    facts = {name: facts_of(worker.trainee(name, **recipe_of(name, recipe))) for name in names}
    return Patient(Checkpoints(folder), facts, Interval(1, 60.0), Replicas(ranks.rank, ranks.world))


def recipe_of(name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """``steps`` may be a number for each expert."""
    steps = recipe.get("steps", 20)
    return {**recipe, "steps": steps[name] if isinstance(steps, dict) else steps}


@contextlib.contextmanager
def at_turn(number: int | None, what: Any) -> Iterator[None]:
    """Do something before the turn, or the step of joint training, of that number (the first is 1)."""
    turns = 0

    def counted(once: Any) -> Any:
        def turn(self: Any, *args: Any) -> Any:
            nonlocal turns
            turns += 1
            if turns == number:
                what()
            return once(self, *args)

        return turn

    before = CoTraining.turn, JointLoop.step
    CoTraining.turn, JointLoop.step = (counted(once) for once in before)  # type: ignore[method-assign]
    try:
        yield
    finally:
        CoTraining.turn, JointLoop.step = before  # type: ignore[method-assign]


def done_file(folder: str, name: str) -> Path:
    return Path(folder) / "done" / f"{name}.pt"


def killed() -> None:
    raise Killed


def cotrain(
    folder: str | None, zero_stage: int, kill_at: int | None, dtype: str = "float32", slots: int = 0, **recipe: Any
) -> dict[str, dict[str, Any]]:
    """Train the six experts of the worker, or die at a turn; by name, this rank's progress, row and drawn rows.

    Those that are done have a file in ``folder/done``, as they would be in the pool, and are not trained again.
    """
    torch.set_num_threads(1)
    ranks = here()
    base = worker.base_model(getattr(torch, dtype))
    frozen = FrozenBase(base, ranks, zero_stage)
    everyone = [worker.trainee(name, **recipe_of(name, recipe)) for name in worker.SIZES]
    mine = [everyone[i] for i in share_out([one.cost for one in everyone], ranks.world)[ranks.rank]]
    slots = slots or len(mine)
    mine = [one for one in mine if folder is None or not done_file(folder, one.name).exists()]
    unfinished = keeper(Path(folder), [one.name for one in mine], ranks, **recipe) if folder else None
    if unfinished:
        unfinished.check()
    drawn: dict[str, list[tuple[int, str]]] = {one.name: [] for one in mine}
    draw = Trainee.draw

    def noted(self: Trainee) -> Any:
        rows = draw(self)
        drawn[self.name].append((self.progress.step, hashlib.sha256(repr(rows).encode()).hexdigest()[:8]))
        return rows

    def store(one: Trainee, row: torch.Tensor) -> None:
        if folder is not None:
            done_file(folder, one.name).parent.mkdir(exist_ok=True)
            torch.save({"row": row, "losses": one.progress.losses}, done_file(folder, one.name))

    Trainee.draw = noted  # type: ignore[method-assign]
    try:
        with at_turn(kill_at, killed):
            found = worker.train(frozen, base, "expert", mine, slots, unfinished=unfinished, on_done=store)
    except Killed:
        return {}
    finally:
        Trainee.draw = draw  # type: ignore[method-assign]
    return {name: {**one, "drawn": drawn[name]} for name, one in found.items()}


def stage(
    name: str, words: Sequence[str], turn: int | None = None, rank: int = 0, number: int = signal.SIGKILL
) -> str:
    """Run a training stage on these ranks; before a turn, a signal is sent to one of them. How it ended."""
    torch.set_num_threads(1)
    ranks = here()
    cfg = read_config(None, words)
    if ranks.world > 1:
        # Unlike a launch, these ranks keep their store.
        ranks.on_main(lambda: dist.distributed_c10d._get_default_store().delete_key(_KEY))
    stop = StopWish(cfg.max_minutes, ranks)

    def send() -> None:
        if number != signal.SIGKILL and not cfg.zero_stage:
            ranks.barrier()  # a rank far ahead may have ended its experts; those of one sharded base keep together
        if ranks.rank == rank:
            os.kill(os.getpid(), number)
            assert stop.wished  # which tells the others

    job, ended = Job(cfg, name, ranks, stop), "done"
    with stop.watching(), at_turn(turn, send):
        try:
            STAGES[name](job)
        except Stopped as stopped:
            ended = f"stopped: {stopped}"
    if "run" in vars(job):
        # These ranks live on, and the run's lock with them.
        job.run.finish("done", ended)
    return ended


def stage_agreeing(name: str, words: Sequence[str]) -> int:
    """:func:`stage`; how often this rank agreed with the others on what to run next."""
    calls = 0
    largest = Ranks.largest

    def counted(self: Ranks, value: int) -> int:
        nonlocal calls
        calls += 1
        return largest(self, value)

    Ranks.largest = counted  # type: ignore[method-assign]
    try:
        assert stage(name, words) == "done"
    finally:
        Ranks.largest = largest  # type: ignore[method-assign]
    return calls


def stage_seen_late(name: str, words: Sequence[str], expert: str) -> str:
    """:func:`stage` where a network file system does not show an expert to rank 1 yet."""
    sees = ExpertPool.__contains__
    if here().rank == 1:
        ExpertPool.__contains__ = lambda self, key: key != expert and sees(self, key)  # type: ignore[method-assign]
    try:
        return stage(name, words)
    finally:
        ExpertPool.__contains__ = sees  # type: ignore[method-assign]
