"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """Counters of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "glider_embedding_requests",
            "requests for embeddings by HTTP status",
            ["status"],
            registry=self.registry,
        )
        self.texts = Counter(
            "glider_embedding_texts",
            "texts by where their embedding came from: memory, disk, shared (another request asked for it at the "
            "same time) or computed",
            ["source"],
            registry=self.registry,
        )
        self.tokens = Counter(
            "glider_embedding_tokens", "tokens computed, padding excluded", registry=self.registry
        )
        self.queue = Gauge("glider_embedding_queue_texts", "texts that wait for the model", registry=self.registry)
        self.batch = Histogram(
            "glider_embedding_batch_texts",
            "texts per forward pass",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "glider_embedding_request_seconds",
            "time from the request's head to its answer",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
            registry=self.registry,
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
