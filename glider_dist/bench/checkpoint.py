"""What keeping unfinished experts costs a training step: the copy that it waits for, and the writing beside it.

``glider-dist bench checkpoint [run_dir=FOLDER]``: SmolLM2-135M, rank 16 on every linear layer, as many experts as
a rank trains at a time by default. The files go into the run directory, so name one on the disk that will be used.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glider_dist.bench.timing import interleave, medians, save, table
from glider_dist.bench.train import ALPHA, BASE, RANK, Bench, trainee
from glider_dist.config import TrainConfig
from glider_dist.parallel.ranks import start_ranks
from glider_dist.training.background import Background
from glider_dist.training.batches import packing_for
from glider_dist.training.checkpoint import Checkpoints
from glider_dist.training.cotrain import CoTraining
from glider_dist.training.runner import Runner, installed
from glider_dist.training.slots import ExpertSlots
from glider_dist.training.unfinished import Interval, Unfinished, facts_of

EXPERTS, ROWS, ROUNDS = 8, 16, 2


class _Timed(Background):
    """Does the work at once, and notes the processor seconds of this thread that it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = 0.0
        self.wall = 0.0

    def submit(self, *work: Callable[[], Any]) -> None:
        processor, wall = time.thread_time(), time.perf_counter()
        for each in work:
            each()
        self.processor, self.wall = time.thread_time() - processor, time.perf_counter() - wall


def run(folder: Path, base: str = BASE) -> None:
    """Print and save the table."""
    bench = Bench(start_ranks(), base=base)
    slots = ExpertSlots(bench.shapes, EXPERTS, RANK, ALPHA, 0, torch.float32, bench.base.device)
    trainees = [trainee(str(index), 1000, ROWS) for index in range(EXPERTS)]
    runner = Runner(bench.frozen, bench.collator, slots)
    loop = CoTraining(runner, trainees, packing_for(bench.base.device, bench.base.model, None, None))
    files = Checkpoints(folder / "bench-checkpoints")
    facts = {one.name: facts_of(one) for one in trainees}
    unfinished = Unfinished(files, facts, Interval(1, 60.0))
    unfinished.background = timed = _Timed()
    written: list[tuple[float, float, float]] = []

    def keep() -> None:
        started = time.perf_counter()
        unfinished.save(dict(enumerate(trainees)), slots, loop.optimizer)
        written.append((time.perf_counter() - started - timed.wall, timed.processor, timed.wall))

    with installed(bench.base.model, (), slots.seen(), gated=False, checkpointing=False):
        loop.fill()
        step = medians(interleave({"step": partial(loop.turn), "save": keep}, ROUNDS))["step"]
    copied, processor, wall = (sorted(column)[len(column) // 2] for column in zip(*written, strict=True))
    every = TrainConfig().save_steps
    size = sum(path.stat().st_size for path in files.folder.rglob("*.safetensors")) / files.keep_last
    cores = torch.get_num_threads() if bench.base.device.type == "cpu" else 1
    row = {
        "experts": EXPERTS,
        "MB": size / 1e6,
        "step s": step,
        "copy s": copied,
        "write s": wall,
        "write CPU s": processor,
        "% waited": 100 * copied / (every * step),
        # As if every second of the writing thread were taken from a core that computes.
        "% with CPU": 100 * (copied + processor / cores) / (every * step),
    }
    print(f"\na checkpoint every {every} steps of {EXPERTS} experts with {ROWS} rows each\n{table([row])}")
    save(folder, "checkpoint", [row], {"base": base, "save_steps": every, "threads": cores})
    shutil.rmtree(files.folder)
