"""Whole processes, timed from outside: many experts in one job, and a job of PEFT for each."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from glider_dist.bench.timing import table
from glider_dist.bench.train import ALPHA, ANSWER, BASE, RANK, RATE, Bench, trainee
from glider_dist.model.base import load_base
from glider_dist.model.batch import Collator, Encoded
from glider_dist.model.sites import linear_sites, peft_targets
from glider_dist.parallel.ranks import start_ranks


@dataclass(frozen=True)
class Load:
    """So many experts, each of so many steps of so many rows; ``runs`` of PEFT's processes are timed."""

    experts: int
    steps: int
    batch: int
    runs: int = 3


LOADS = (Load(32, 20, 2), Load(8, 10, 16))
ON_A_GPU = (Load(64, 50, 2, runs=1), Load(64, 50, 16, runs=1))


def run() -> list[dict[str, Any]]:
    """Print a table for each of :data:`LOADS`, or of :data:`ON_A_GPU`; there the peak is the GPU's memory."""
    loads = ON_A_GPU if torch.cuda.is_available() else LOADS
    return [{**asdict(load), **row} for load in loads for row in _compare(load)]


def _compare(load: Load) -> list[dict[str, Any]]:
    def process(*words: str) -> dict[str, float]:
        started = time.perf_counter()
        sizes = map(str, (load.experts, load.steps, load.batch))
        command = [sys.executable, "-m", "glider_dist.bench.train_startup", words[0], *sizes, *words[1:]]
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
        found = [process(word, str(index)) for index in range(load.runs)]
        one = {key: statistics.median(each[key] for each in found) for key in found[0]}
        rows.append(row(name, one, load.experts, ours))
    print(
        f"\n{load.experts} experts of {load.steps} steps of {load.batch} rows, from the start of Python; "
        f"{load.runs} of PEFT's processes were run, their medians count {load.experts} times\n{table(rows)}",
        flush=True,
    )
    return rows


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
    """Do it, and print its seconds and this process's peak memory for :func:`run`."""
    started = time.perf_counter()
    work()
    if on_a_gpu := torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 1e6
    if not on_a_gpu:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


def _process(kind: str, experts: str, steps: str, batch: str, name: str = "") -> None:
    """One of the processes that :func:`run` times."""
    load = Load(int(experts), int(steps), int(batch))
    if kind == "one-job":
        one_job(load)
    else:
        one_peft(load, name, kind == "one-trainer")


if __name__ == "__main__":
    _process(*sys.argv[1:])
