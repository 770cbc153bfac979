"""Arrow here and in PEFT: time and memory of a forward pass over 8, 32 and 128 adapters.

``python -m glider_dist.bench.arrow`` prints the table. Both run in fp32 on the CPU over a random Llama of two
layers of width 576 (those of SmolLM2-135M) and the same rank-16 adapters, each in a process of its own; the logits
must agree to 1e-4. The adapters have one dominant direction per site: on others PEFT's prototypes, from 15 power
iterations, are not those of Arrow.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.model.attach import attach_pool
from glider_dist.model.sites import fingerprint, linear_sites, peft_targets
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import write_adapter
from glider_dist.testing import tiny_causal

COUNTS = (8, 32, 128)
BATCH, LENGTH, RANK, TOP_K, REPEATS = 4, 64, 16, 2, 5
SIZE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def dominant_pool(path: Path, model: Any, experts: int, rank: int = RANK, strength: float = 20.0) -> ExpertPool:
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
            a[0] *= strength
            weights[name] = (a, b)
        with tempfile.TemporaryDirectory() as folder:
            alpha = rank * (0.2 + 0.1 * (index % 5))
            write_adapter(Path(folder), weights, alpha, peft_targets(sites, model), "random", kind)
            pool.add(f"expert_{index}", adapter=folder)
    return pool


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"{BATCH} x {LENGTH} tokens, rank {RANK}, top_k {TOP_K}, one thread; MB over the base alone")
    print(f"{'adapters':>8} {'':5} {'first s':>8} {'then s':>8} {'held MB':>8} {'peak MB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            path = Path(folder) / str(count)
            dominant_pool(path, tiny_causal(**SIZE), count)
            logits = []
            for who in ("peft", "ours"):
                with multiprocessing.get_context("spawn").Pool(1) as process:
                    numbers, made = process.apply(measure, (who, str(path)))
                logits.append(torch.tensor(made))
                print(f"{count:8} {who:5} " + " ".join(f"{number:8.3g}" for number in numbers), flush=True)
            distance = float((logits[0] - logits[1]).norm() / logits[0].norm())
            if not distance < 1e-4:
                raise GliderError(f"with {count} adapters the logits differ by {distance:.1e}; this is a bug")


def measure(who: str, path: str) -> tuple[tuple[float, float, float, float], list[float]]:
    """Seconds of the first forward (prototypes included) and of the next ones (median), resident MB once loaded
    and at the peak of a later forward, both over the base alone; and the logits of the last tokens.
    """
    torch.set_num_threads(1)
    pool = ExpertPool.open(path)
    model: Any = tiny_causal(**SIZE)
    ids = torch.randint(4, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids)
        before = _memory("VmRSS")
        if who == "peft":
            from peft import ArrowConfig, create_arrow_model

            paths = [str(expert.folder) for expert in pool.experts()]
            model = create_arrow_model(model, paths, ArrowConfig(top_k=TOP_K, rng_seed=0)).eval()
        else:
            model = attach_pool(model, pool, RouterConfig(kind="arrow", top_k=TOP_K))
        started = time.perf_counter()
        model(ids)
        first = time.perf_counter() - started
        held = _memory("VmRSS") - before
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            logits = model(ids).logits
            seconds.append(time.perf_counter() - started)
        peak = _memory("VmHWM") - before
    return (first, statistics.median(seconds), held, peak), logits[:, -1].flatten().tolist()


def _memory(key: str) -> float:
    """MB from ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
