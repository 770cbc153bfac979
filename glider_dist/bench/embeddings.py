"""``glider-dist bench embeddings [peer=URL] [requests=2000]``: the embedding service against the bare model.

Both embed the same texts: the bare model all of them at once in batches of its own (length-sorted, as
sentence-transformers does), the service in requests of 64 from 1, 8 and 32 concurrent clients. The two are
measured in turn, several rounds, and compared by the median of the rounds' ratios. The processor time of the
service is compared, too, since it does not depend on what else the machine does. Another server that is already
running with the same model (``peer``) takes its turns beside ours. Then cached texts are asked for, one a request:
the median and 99th percentile of their time, and the memory of the service before and after.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil
import torch

from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.pool.files import write_json
from glider_dist.semantics.auto import OwnService
from glider_dist.semantics.client import RemoteEmbedder
from glider_dist.semantics.embedder import Embedder

_WORDS = (
    *("translate", "sentence", "french", "english", "word", "plural", "negative", "positive", "review", "film"),
    *("question", "answer", "number", "city", "capital", "country", "sentiment", "topic", "news", "headline"),
    *("rhyme", "opposite", "meaning", "grammar", "date", "person", "name", "language", "code", "write"),
)
_CLIENTS = (1, 8, 32)
_REQUEST = 64


@dataclass(frozen=True)
class _Endpoint:
    """A server to measure; ``process`` only if it is ours."""

    name: str
    url: str
    token: str | None = None
    process: psutil.Process | None = None

    def client(self, cfg: Config) -> RemoteEmbedder:
        return RemoteEmbedder(cfg.embedder, self.url, cfg.service, self.token)


def run(folder: Path, peer: str | None = None, texts: int = 512, rounds: int = 7, requests: int = 2000) -> None:
    """Print the table and write ``bench_embeddings.json``.

    Raises:
        GliderError: the service's vectors are not those of the model.
    """
    cfg = Config()
    cfg.service.cache = str(Path(tempfile.mkdtemp(prefix="glider-dist-bench-")) / "embeddings.sqlite")
    cfg.service.request_texts = _REQUEST
    local = Embedder(cfg.embedder)
    service = OwnService(cfg, "127.0.0.1")
    try:
        ours = _Endpoint("ours", service.access.url, service.access.token, psutil.Process(service.pid))
        endpoints = [ours, *([_Endpoint("peer", peer)] if peer else [])]
        for endpoint in endpoints:
            _check(cfg, endpoint, local)
        record = _throughput(cfg, endpoints, local, texts, rounds)
        record.update(_cached(service, cfg, requests))
    finally:
        service.stop()
    write_json(folder / "bench_embeddings.json", record)


def _texts(count: int, seed: str) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(_WORDS, k=rng.randint(4, 40))) for _ in range(count)]


def _check(cfg: Config, endpoint: _Endpoint, local: Embedder) -> None:
    texts = _texts(64, "check")
    difference = float((endpoint.client(cfg).embed(texts) - local.compute(texts)).abs().max())
    # Another server may compute in half precision.
    if difference > (1e-5 if endpoint.process else 1e-2):
        raise GliderError(f"the vectors of {endpoint.url} differ from the model's by {difference:.1e}")
    print(f"largest difference between the vectors of {endpoint.name} and of the model: {difference:.1e}")


def _throughput(
    cfg: Config, endpoints: Sequence[_Endpoint], local: Embedder, texts: int, rounds: int
) -> dict[str, object]:
    keys = [(endpoint.name, clients) for clients in _CLIENTS for endpoint in endpoints]
    ratios: dict[tuple[str, int], list[float]] = {key: [] for key in keys}
    costs: dict[int, list[float]] = {clients: [] for clients in _CLIENTS}
    rates: list[float] = []
    model = local.load()
    for turn in range(rounds):
        for clients in _CLIENTS:
            # Fresh texts each time: nothing of this part comes from a cache.
            part = _texts(texts, f"{turn} {clients}")
            encode = partial(model.encode, part, batch_size=32, show_progress_bar=False)
            bare, bare_cost = _timed(encode, psutil.Process())
            rates.append(texts / bare)
            for endpoint in endpoints:
                remotes = [endpoint.client(cfg) for _ in range(clients)]
                shares = [part[i::clients] for i in range(clients)]
                served, cost = _timed(partial(_all, remotes, shares), endpoint.process or psutil.Process())
                for remote in remotes:
                    remote.close()
                ratios[endpoint.name, clients].append(bare / served)
                if endpoint.process:
                    costs[clients].append(cost / bare_cost)
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {texts} texts a round, {rounds} rounds")
    print(f"bare model: {statistics.median(rates):.0f} texts/s")
    print(f"{'server':>8} {'clients':>8} {'throughput over bare':>21} {'processor time over bare':>25}")
    for name, clients in keys:
        share = f"{statistics.median(costs[clients]):.2f}" if name == "ours" else "not seen"
        print(f"{name:>8} {clients:8d} {statistics.median(ratios[name, clients]):21.2f} {share:>25}")
    return {
        "texts_per_second": rates,
        "throughput_over_bare": {f"{name}, {clients}": values for (name, clients), values in ratios.items()},
        "processor_time_over_bare": costs,
    }


def _all(remotes: Sequence[RemoteEmbedder], shares: Sequence[list[str]]) -> None:
    with ThreadPoolExecutor(len(remotes)) as threads:
        list(threads.map(lambda pair: pair[0].embed(pair[1]), zip(remotes, shares, strict=True)))


def _timed(work: Callable[[], object], process: psutil.Process) -> tuple[float, float]:
    """Seconds by the clock, and of processor time of ``process``."""
    before, started = sum(process.cpu_times()[:2]), time.perf_counter()
    work()
    return time.perf_counter() - started, max(sum(process.cpu_times()[:2]) - before, 1e-3)


def _cached(service: OwnService, cfg: Config, requests: int) -> dict[str, object]:
    known = _texts(256, "cached")
    RemoteEmbedder(cfg.embedder, service.access.url, cfg.service, service.access.token).embed(known)
    headers = {"Authorization": f"Bearer {service.access.token}"}
    process = psutil.Process(service.pid)
    seconds = []
    with httpx.Client(base_url=service.access.url, headers=headers, trust_env=False) as http:
        memory = [process.memory_info().rss]
        for i in range(requests):
            body = {"model": cfg.embedder, "input": known[i % len(known)], "encoding_format": "base64"}
            started = time.perf_counter()
            http.post("/v1/embeddings", json=body).raise_for_status()
            seconds.append(time.perf_counter() - started)
            if (i + 1) % max(requests // 10, 1) == 0:
                memory.append(process.memory_info().rss)
    points = statistics.quantiles(seconds, n=100)
    p50, p99 = points[49] * 1000, points[98] * 1000
    mebibytes = [round(value / 2**20, 1) for value in memory]
    print(f"cached texts, {requests} requests of one: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    print(f"memory of the service over them: {mebibytes} MiB")
    return {"cached_p50_ms": p50, "cached_p99_ms": p99, "memory_mib": mebibytes}
