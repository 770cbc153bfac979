"""Training many experts in one loop against one after another, and against separate PEFT runs.

``glider-dist bench train [startup] [sharded] [mixing] [batches] [run_dir=FOLDER]``: all of them by default, about
fifteen minutes on two cores. The base is SmolLM2-135M, the rows are random tokens, the experts have rank 16
on every linear layer. One process with all its threads, or with a GPU where there is one, but for the last table.
Ways are timed in turn, and ratios are of medians. What a GPU measures instead stands in brackets.

    mixing    one step whose rows belong to 1, 4, 16 or 64 experts, equal tokens: 1,024 and 4,096 [and 16,384]
    batches   16 [64] experts together and one after another, 2 and 16 rows a step
    startup   32 experts of 20 steps of 2 rows, and 8 of 10 steps of 16 [64 of 50 steps of 2 and of 16], from the
              start of Python: one process; one process each with PEFT, by hand and with transformers' Trainer
    sharded   two ranks on the CPU, the base replicated and under ZeRO 3
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glider_dist.bench.timing import interleave, medians, save
from glider_dist.config import TrainConfig
from glider_dist.errors import GliderError
from glider_dist.model.base import load_base
from glider_dist.model.batch import Collator, Encoded
from glider_dist.model.engine import FrozenBase
from glider_dist.model.sites import linear_sites
from glider_dist.parallel.ranks import Ranks, start_ranks
from glider_dist.training.batches import Packing, packing_for
from glider_dist.training.cotrain import CoTraining
from glider_dist.training.runner import Runner, installed
from glider_dist.training.slots import ExpertSlots
from glider_dist.training.trainee import Recipe, Trainee

BASE = "smollm2-135m"
RANK, ALPHA, RATE, ANSWER, EXAMPLES = 16, 16, 1e-3, 4, 64
ROUNDS, EXPERTS, EXPERTS_ON_A_GPU = 3, 16, 64
MIXED, ROW_LENGTHS, MORE_ON_A_GPU = (1, 4, 16, 64), (16, 64), (256,)
PARTS = ("startup", "sharded", "mixing", "batches")
"""In the order in which they run: first what loads no base into this process."""


class Bench:
    """The base, loaded once."""

    def __init__(self, ranks: Ranks, zero_stage: int = 0, base: str = BASE) -> None:
        self.base = load_base(base, "auto", str(ranks.device))
        self.frozen = FrozenBase(self.base, ranks, zero_stage)
        self.collator = Collator(self.base, 512)
        self.shapes = {name: site.shape for name, site in linear_sites(self.base.model).items()}

    @property
    def on_a_gpu(self) -> bool:
        return self.base.device.type == "cuda"

    def train(self, trainees: list[Trainee], slots: int, packing: Packing | None = None) -> CoTraining:
        """Train them, so many at a time."""
        made = ExpertSlots(self.shapes, slots, RANK, ALPHA, 0, torch.float32, self.base.device)
        runner = Runner(self.frozen, self.collator, made)
        loop = CoTraining(runner, trainees, packing or packing_for(self.base.device, self.base.model, None, None))
        with installed(self.base.model, (), made.seen(), gated=False, checkpointing=False):
            loop.run(lambda trainee, row: None)
        return loop

    def speed_of_light(self) -> float:
        """Operations a second of a square matrix product in the base's dtype."""
        width = 8192 if self.on_a_gpu else 2048
        a = torch.randn(width, width, device=self.base.device, dtype=self.base.dtype)
        return 2 * width**3 / medians(interleave({"": lambda: a @ a}, ROUNDS))[""]


def examples_of(name: str, low: int, high: int) -> list[Encoded]:
    """Examples of ``low`` to ``high`` random tokens."""
    draw = random.Random(name)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1000, 40000) for _ in range(count))

    return [Encoded(tokens(draw.randint(low, high) - ANSWER), tokens(ANSWER)) for _ in range(EXAMPLES)]


def trainee(name: str, steps: int, batch: int, low: int = 12, high: int = 36) -> Trainee:
    """An expert that is validated once, at its end, on one row."""
    train = TrainConfig(max_steps=steps, batch_size=batch, learning_rate=RATE, eval_every=steps)
    data = examples_of(name, low, high)
    return Trainee(name, data, data[:1], Recipe.of(train, 0))


def mixing(bench: Bench) -> list[dict[str, Any]]:
    lengths = ROW_LENGTHS + (MORE_ON_A_GPU if bench.on_a_gpu else ())
    return [row for length in lengths for row in _mixing(bench, length)]


def _mixing(bench: Bench, length: int) -> list[dict[str, Any]]:
    """One forward and backward of 64 rows of ``length`` tokens, and one update of each expert."""
    tokens = 64 * length
    together = Packing(tokens, tokens + 1, tokens, 0)

    def slots_and_step(experts: int) -> Callable[[], Any]:
        made = ExpertSlots(bench.shapes, experts, RANK, ALPHA, 0, torch.float32, bench.base.device)
        loop = CoTraining(
            Runner(bench.frozen, bench.collator, made),
            [trainee(str(index), 10, 64 // experts, length, length) for index in range(experts)],
            together,
        )
        loop.fill()

        def step() -> None:
            with installed(bench.base.model, (), made.seen(), gated=False, checkpointing=False):
                loop.turn()

        return step

    seconds = medians(interleave({str(count): slots_and_step(count) for count in MIXED}, ROUNDS))
    print(f"\none step of 64 rows of {length} tokens, each expert's AdamW included")
    for name, value in seconds.items():
        print(f"{name:>4} experts {value:8.3f} s {value / seconds['1']:8.2f}x", flush=True)
    return [{"tokens": tokens, "experts": int(name), "s": value} for name, value in seconds.items()]


def batches(bench: Bench) -> list[dict[str, Any]]:
    """In one process, together and one after another."""
    peak = bench.speed_of_light()
    parameters = sum(p.numel() for p in bench.base.model.parameters())
    experts = EXPERTS_ON_A_GPU if bench.on_a_gpu else EXPERTS
    print(f"\n{experts} experts in one process; matrix products reach {peak / 1e12:.2f} TFLOP/s here")
    found = []
    for batch, steps in ((2, 4), (16, 1)):
        loops: dict[int, CoTraining] = {}

        def way(slots: int, batch: int = batch, steps: int = steps, loops: dict[int, CoTraining] = loops) -> None:
            loops[slots] = bench.train([trainee(str(index), steps, batch) for index in range(experts)], slots)

        ways = {"one after another": 1, "together": experts}
        seconds = medians(interleave({name: partial(way, slots) for name, slots in ways.items()}, ROUNDS))
        for name, slots in ways.items():
            runner = loops[slots].runner
            rate = runner.tokens / seconds[name]
            padding = 100 * runner.padding / (runner.padding + runner.tokens)
            reached = 100 * 4 * parameters * rate / peak
            print(
                f"{batch:3} rows a step, {name:18} {rate:7.0f} tokens/s, "
                f"{padding:4.1f} % padding, {reached:4.1f} % of the products' speed"
            )
            numbers = {"s": seconds[name], "tokens/s": rate, "% padding": padding, "% of products": reached}
            found.append({"way": name, "experts": experts, "steps": steps, "batch": batch, **numbers})
        ratio = seconds["one after another"] / seconds["together"]
        print(f"{batch:3} rows a step: together is {ratio:.2f} times as fast", flush=True)
    loop = loops[experts]
    print(
        f"an expert in training takes {loop.slots.bytes_per_expert / 1e6:.1f} MB of weights and gradients and "
        f"{loop.optimizer.bytes_per_expert / 1e6:.1f} MB of moments"
    )
    return found


def run(folder: Path, parts: Sequence[str] = (), base: str = BASE) -> None:
    """Print the tables of ``parts``, or all, and write each as ``bench_train_PART.json``.

    Args:
        base: of all but ``startup``, whose processes train :data:`BASE`.

    Raises:
        GliderError: there is no such part, or the losses of ``sharded`` differ, which would be a bug.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise GliderError(f"bench train knows {', '.join(PARTS)}, not {unknown[0]!r}")
    bench: Bench | None = None
    for part in PARTS:
        if parts and part not in parts:
            continue
        if part == "startup":
            from glider_dist.bench import train_startup

            rows = train_startup.run()
        elif part == "sharded":
            from glider_dist.bench import train_sharded

            rows = train_sharded.run(base)
        else:
            bench = bench or Bench(start_ranks(), base=base)
            rows = mixing(bench) if part == "mixing" else batches(bench)
        save(folder, f"train_{part}", rows, {"base": base, "rank": RANK})
