"""``glider-dist bench arrow``: Arrow here and in PEFT, time and memory of a forward over 8, 32 and 128 adapters.

Both run in fp32 on the CPU over a random Llama of two layers of width 576 (those of SmolLM2-135M) and the same
rank-16 adapters, each in a process of its own with one thread. The processes take turns, forward by forward, so
that whatever else the machine does falls on both; the logits must agree to 1e-4. The adapters have one dominant
direction per site: on others PEFT's prototypes, from 15 power iterations, are not those of Arrow.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.model.attach import attach_pool
from glider_dist.model.sites import fingerprint, linear_sites, peft_targets
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import write_adapter
from glider_dist.pool.files import write_json
from glider_dist.testing import tiny_causal
from glider_dist.text_table import table

COUNTS = (8, 32, 128)
BATCH, LENGTH, RANK, TOP_K, ROUNDS = 4, 64, 16, 2, 9
SIZE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
SIDES = ("peft", "ours")
DOMINANT = 20.0


def run(folder: Path) -> None:
    """Measure, print the table, and write every number to ``bench_arrow.json``.

    Raises:
        GliderError: the two give different logits.
    """
    setting = f"{BATCH} x {LENGTH} tokens, rank {RANK}, top_k {TOP_K}, fp32, one thread, {ROUNDS} rounds in turns"
    print(setting, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        rows = [compare(Path(scratch) / str(count), count) for count in COUNTS]
    write_json(folder / "bench_arrow.json", {"setting": setting, "rows": rows})
    print(arrow_table(rows), flush=True)


def arrow_table(rows: list[dict[str, Any]]) -> str:
    """One line per number of adapters: the median forward of both and its ratio, and memory over the base's."""
    titles = ["adapters"]
    titles += [f"{side} {what}" for what in ("ms", "first ms", "held MB", "peak MB") for side in SIDES]
    titles.insert(3, "ratio")
    lines = []
    for row in rows:
        cells = [str(row["adapters"])]
        for key, factor in (("median", 1e3), ("first", 1e3), ("held_mb", 1), ("peak_mb", 1)):
            cells += [f"{row[side][key] * factor:.0f}" for side in SIDES]
        cells.insert(3, f"{row['ratio']:.1f}x")
        lines.append(cells)
    return table(titles, lines, right=titles, cut=False)


def compare(path: Path, count: int) -> dict[str, Any]:
    """Numbers of both sides with ``count`` adapters: seconds of the first forward (prototypes included) and of the
    later ones, MB held once loaded and at the peak of a later forward, both over the base alone.

    Raises:
        GliderError: the two give different logits.
    """
    dominant_pool(path, tiny_causal(**SIZE), count)
    with _process("peft", path) as peft, _process("ours", path) as ours:
        pipes = dict(zip(SIDES, (peft, ours), strict=True))
        result: dict[str, Any] = {"adapters": count}
        for side, pipe in pipes.items():
            result[side] = {**_ask(pipe, "load"), "seconds": []}
        for turn in range(ROUNDS):
            for side in SIDES if turn % 2 else reversed(SIDES):
                result[side]["seconds"].append(_ask(pipes[side], "forward"))
        logits = []
        for side, pipe in pipes.items():
            last = _ask(pipe, "end")
            result[side] |= {"peak_mb": last["peak_mb"], "median": statistics.median(result[side]["seconds"])}
            logits.append(torch.tensor(last["logits"]))
    distance = float((logits[0] - logits[1]).norm() / logits[0].norm())
    if not distance < 1e-4:
        raise GliderError(f"with {count} adapters the logits differ by {distance:.1e}; this is a bug")
    return {**result, "ratio": result["peft"]["median"] / result["ours"]["median"], "distance": distance}


@contextmanager
def _process(side: str, path: Path) -> Iterator[Any]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(side, str(path), there), daemon=True
    )
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join(10)
        process.kill()


def _ask(pipe: Any, what: str) -> Any:
    pipe.send(what)
    try:
        return pipe.recv()
    except EOFError:
        raise GliderError("a process of the measurement has ended; its error is above") from None


def _serve(side: str, path: str, pipe: Any) -> None:
    """One side's process: load, then one forward whenever asked."""
    torch.set_num_threads(1)
    pool = ExpertPool.open(path)
    model: Any = tiny_causal(**SIZE)
    ids = torch.randint(4, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    logits = torch.empty(0)
    with torch.inference_mode():
        model(ids)
        before = _memory("VmRSS")
        while (what := pipe.recv()) != "end":
            if what == "load":
                model = _attached(side, model, pool)
            started = time.perf_counter()
            logits = model(ids).logits
            seconds = time.perf_counter() - started
            if what == "forward":
                pipe.send(seconds)
                continue
            pipe.send({"first": seconds, "held_mb": _memory("VmRSS") - before})
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    pipe.send({"peak_mb": _memory("VmHWM") - before, "logits": logits[:, -1].flatten().tolist()})


def _attached(side: str, model: Any, pool: ExpertPool) -> Any:
    if side == "ours":
        return attach_pool(model, pool, RouterConfig(kind="arrow", top_k=TOP_K))
    from peft import ArrowConfig, create_arrow_model

    paths = [str(expert.folder) for expert in pool.experts()]
    return create_arrow_model(model, paths, ArrowConfig(top_k=TOP_K, rng_seed=0)).eval()


def _memory(key: str) -> float:
    """MB from ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def dominant_pool(path: Path, model: Any, experts: int, rank: int = RANK) -> ExpertPool:
    """Random experts whose ``B A`` has, at every site, one singular value far above the others; no gates."""
    pool = ExpertPool.create(path, base="random", fingerprint=fingerprint(model))
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    sites = linear_sites(model)
    generator = torch.Generator().manual_seed(3)
    for index in range(experts):
        weights = {}
        for name, site in sites.items():
            d_out, d_in = site.shape
            a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            b = torch.randn(d_out, rank, generator=generator) / d_out**0.5
            a[0] *= DOMINANT
            weights[name] = (a, b)
        with tempfile.TemporaryDirectory() as folder:
            alpha = rank * (0.2 + 0.1 * (index % 5))
            write_adapter(Path(folder), weights, alpha, peft_targets(sites, model), "random", kind)
            pool.add(f"expert_{index}", adapter=folder)
    return pool
