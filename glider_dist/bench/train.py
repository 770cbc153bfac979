"""Training many experts in one loop against one after another, and against separate PEFT runs.

``glider-dist bench train [startup] [sharded] [mixing] [batches] [run_dir=FOLDER]``: all of them by default, about
fifteen minutes on two cores. The base is SmolLM2-135M, the rows are random tokens, the experts have rank 16
on every linear layer. One process with all its threads, but for the last table. Ways are timed in turn, and ratios
are of medians.

    mixing    one step whose rows belong to 1, 4, 16 or 64 experts, equal tokens: 1,024 and 4,096
    batches   16 experts together and one after another, 2 and 16 rows a step
    startup   32 experts of 20 steps of 2 rows, and 8 of 10 steps of 16, from the start of Python: one process; one
              process each with PEFT, by hand and with transformers' Trainer
    sharded   two ranks, the base replicated and under ZeRO 3
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glider_dist.bench.timing import interleave, medians
from glider_dist.bench.timing import table as table_of
from glider_dist.config import TrainConfig
from glider_dist.errors import GliderError
from glider_dist.model.base import load_base
from glider_dist.model.batch import Collator, Encoded
from glider_dist.model.engine import FrozenBase
from glider_dist.model.sites import linear_sites, peft_targets
from glider_dist.parallel.ranks import Ranks, start_ranks
from glider_dist.pool.files import write_json
from glider_dist.training.batches import Packing, packing_for
from glider_dist.training.cotrain import CoTraining
from glider_dist.training.runner import Runner, installed
from glider_dist.training.slots import ExpertSlots
from glider_dist.training.trainee import Recipe, Trainee

BASE = "smollm2-135m"
RANK, ALPHA, RATE, ANSWER, EXAMPLES = 16, 16, 1e-3, 4, 64
ROUNDS, EXPERTS = 3, 16
PEFT_RUNS = 3
MIXED, ROW_LENGTHS = (1, 4, 16, 64), (16, 64)


@dataclass(frozen=True)
class Load:
    """So many experts, each of so many steps of so many rows."""

    experts: int
    steps: int
    batch: int


LOADS = (Load(32, 20, 2), Load(8, 10, 16))
PARTS = ("startup", "sharded", "mixing", "batches")
"""In the order in which they run: first what loads no base into this process."""


class Bench:
    """The base, loaded once."""

    def __init__(self, ranks: Ranks, zero_stage: int = 0, base: str = BASE) -> None:
        self.base = load_base(base, "auto", str(ranks.device))
        self.frozen = FrozenBase(self.base, ranks, zero_stage)
        self.collator = Collator(self.base, 512)
        self.shapes = {name: site.shape for name, site in linear_sites(self.base.model).items()}

    def train(self, trainees: list[Trainee], slots: int, packing: Packing | None = None) -> CoTraining:
        """Train them, so many at a time."""
        made = ExpertSlots(self.shapes, slots, RANK, ALPHA, 0, torch.float32, self.base.device)
        runner = Runner(self.frozen, self.collator, made)
        loop = CoTraining(runner, trainees, packing or packing_for(self.base.device, None, None))
        with installed(self.base.model, (), made.seen(), gated=False, checkpointing=False):
            loop.run(lambda trainee, row: None)
        return loop

    def speed_of_light(self) -> float:
        """Operations a second of a square matrix product in the base's dtype."""
        a = torch.randn(2048, 2048, device=self.base.device, dtype=self.base.dtype)
        seconds = medians(interleave({"": lambda: float((a @ a)[0, 0])}, ROUNDS))[""]
        return 2 * 2048**3 / seconds


def rows(name: str, low: int, high: int) -> list[Encoded]:
    """Examples of ``low`` to ``high`` random tokens."""
    draw = random.Random(name)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1000, 40000) for _ in range(count))

    return [Encoded(tokens(draw.randint(low, high) - ANSWER), tokens(ANSWER)) for _ in range(EXAMPLES)]


def trainee(name: str, steps: int, batch: int, low: int = 12, high: int = 36) -> Trainee:
    """An expert that is validated once, at its end, on one row."""
    train = TrainConfig(max_steps=steps, batch_size=batch, learning_rate=RATE, eval_every=steps)
    data = rows(name, low, high)
    return Trainee(name, data, data[:1], Recipe.of(train, 0))


def mixing(bench: Bench) -> list[dict[str, Any]]:
    return [row for length in ROW_LENGTHS for row in _mixing(bench, length)]


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
    print(f"\n{EXPERTS} experts in one process; matrix products reach {peak / 1e12:.2f} TFLOP/s here")
    found = []
    for batch, steps in ((2, 4), (16, 1)):
        loops: dict[int, CoTraining] = {}

        def way(slots: int, batch: int = batch, steps: int = steps, loops: dict[int, CoTraining] = loops) -> None:
            loops[slots] = bench.train([trainee(str(index), steps, batch) for index in range(EXPERTS)], slots)

        ways = {"one after another": 1, "together": EXPERTS}
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
            found.append({"way": name, "experts": EXPERTS, "steps": steps, "batch": batch, **numbers})
        ratio = seconds["one after another"] / seconds["together"]
        print(f"{batch:3} rows a step: together is {ratio:.2f} times as fast", flush=True)
    loop = loops[EXPERTS]
    print(
        f"an expert in training takes {loop.slots.bytes_per_expert / 1e6:.1f} MB of weights and gradients and "
        f"{loop.optimizer.bytes_per_expert / 1e6:.1f} MB of moments"
    )
    return found


def one_job(load: Load) -> None:
    """All of them in this process."""
    bench = Bench(start_ranks())
    mine = [trainee(str(index), load.steps, load.batch) for index in range(load.experts)]
    _told(lambda: bench.train(mine, load.experts))


def one_peft(load: Load, name: str, trainer: bool) -> None:
    """One of them in this process, as PEFT's documentation does it: by hand, or with transformers' Trainer."""
    from peft import LoraConfig, get_peft_model

    ranks = start_ranks()
    base = load_base(BASE, "auto", str(ranks.device))
    targets = peft_targets(linear_sites(base.model), base.model)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base.model, config)
    collator, one = Collator(base, 512), trainee(name, load.steps, load.batch)

    def inputs(items: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        ids, mask = collator.pad_rows([item.prompt + item.answer for item in items], left=True)
        labels = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < ids.shape[1] - ANSWER, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def by_hand() -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        for _ in range(load.steps):
            model(**inputs(one.draw())).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def by_trainer() -> None:
        from transformers import Trainer, TrainingArguments

        settings = TrainingArguments(
            tempfile.mkdtemp(), max_steps=load.steps, per_device_train_batch_size=load.batch, learning_rate=RATE,
            lr_scheduler_type="constant", weight_decay=0.0, save_strategy="no", logging_strategy="no",
            report_to=[], disable_tqdm=True, remove_unused_columns=False, use_cpu=ranks.device.type == "cpu",
            dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, settings, inputs, one.train).train()

    _told(by_trainer if trainer else by_hand)


def _told(work: Callable[[], Any]) -> None:
    """Do it, and print its seconds and this process's peak memory for :func:`startup`."""
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}))


def startup() -> list[dict[str, Any]]:
    """Whole processes, timed from outside."""
    return [{**asdict(load), **row} for load in LOADS for row in _startup(load)]


def _startup(load: Load) -> list[dict[str, Any]]:
    def process(*words: str) -> dict[str, float]:
        started = time.perf_counter()
        sizes = map(str, (load.experts, load.steps, load.batch))
        command = [sys.executable, "-m", "glider_dist.bench.train", words[0], *sizes, *words[1:]]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return {"whole": time.perf_counter() - started, **found}

    def row(name: str, one: dict[str, float], times: int, ours: dict[str, float]) -> dict[str, Any]:
        whole, seconds = times * one["whole"], times * one["seconds"]
        return {
            "way": name, "processes": times, "s": whole, "without start-up s": seconds, "peak MB": one["peak_mb"],
            "times as long": whole / ours["whole"], "without start-up": seconds / ours["seconds"],
        }  # fmt: skip

    ours = process("one-job")
    rows = [row("one process", ours, 1, ours)]
    for name, word in (("PEFT by hand", "one-peft"), ("PEFT with the Trainer", "one-trainer")):
        found = [process(word, str(index)) for index in range(PEFT_RUNS)]
        one = {key: statistics.median(each[key] for each in found) for key in found[0]}
        rows.append(row(name, one, load.experts, ours))
    print(
        f"\n{load.experts} experts of {load.steps} steps of {load.batch} rows, from the start of Python; "
        f"{PEFT_RUNS} of PEFT's processes were run, their medians count {load.experts} times\n{table_of(rows)}",
        flush=True,
    )
    return rows


def run(folder: Path, parts: Sequence[str] = (), base: str = BASE) -> None:
    """Print the tables of ``parts``, or all, and write ``bench_train.json``.

    Args:
        base: of all but ``startup``, whose processes train :data:`BASE`.

    Raises:
        GliderError: there is no such part, or the losses of ``sharded`` differ, which would be a bug.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise GliderError(f"bench train knows {', '.join(PARTS)}, not {unknown[0]!r}")
    found: dict[str, list[dict[str, Any]]] = {}
    bench: Bench | None = None
    for part in PARTS:
        if parts and part not in parts:
            continue
        if part == "startup":
            found[part] = startup()
        elif part == "sharded":
            from glider_dist.bench import train_sharded

            found[part] = train_sharded.run(base)
        else:
            bench = bench or Bench(start_ranks(), base=base)
            found[part] = mixing(bench) if part == "mixing" else batches(bench)
    write_json(folder / "bench_train.json", {"bench": "train", "base": base, "rank": RANK, **found})


def _process(kind: str, experts: str, steps: str, batch: str, name: str = "") -> None:
    """One of the processes that :func:`startup` times."""
    load = Load(int(experts), int(steps), int(batch))
    if kind == "one-job":
        one_job(load)
    else:
        one_peft(load, name, kind == "one-trainer")


if __name__ == "__main__":
    _process(*sys.argv[1:])
