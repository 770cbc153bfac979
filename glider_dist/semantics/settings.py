"""Settings of the embedding service and of ``describe``."""

from __future__ import annotations

from dataclasses import dataclass

from glider_dist.fields import not_negative, positive, setting


@dataclass
class ServiceConfig:
    """The embedding service. Its token and, if it shall not be recorded, its address come from the environment:
    ``GLIDER_DIST_SERVICE_TOKEN`` and ``GLIDER_DIST_SERVICE_URL``."""

    url: str | None = setting(
        None,
        "embeddings endpoint (ours, vLLM, Text Embeddings Inference, hosted); auto: the job starts its own; "
        "None: $GLIDER_DIST_SERVICE_URL, else the model in each process",
    )
    host: str = setting("127.0.0.1", "serve-embeddings: address to listen on; a token is needed beyond loopback")
    port: int = setting(8090, "serve-embeddings: port; 0: a free one", must_be="a port, 0 to 65535")
    token_file: str | None = setting(
        None, "file with the bearer token, where $GLIDER_DIST_SERVICE_TOKEN is not set"
    )
    model: str | None = setting(
        None, "model to ask the endpoint for; None: the embedder's name, or its only model"
    )
    timeout: float = positive(60.0, "seconds to keep trying when the endpoint does not answer")
    fallback: bool = setting(True, "then load the embedder in this process, and say so once; false: stop")
    request_texts: int = positive(128, "texts per request to the endpoint; fewer where it refuses so many")
    query_prefix: str | None = setting(
        None,
        "put before each query, with a service or without, as E5 models need ('query: ', in quotes); in the index",
    )
    description_prefix: str | None = setting(
        None, "put before each description, with a service or without; in the index"
    )
    device: str = setting("cpu", "device of the service's model", ("auto", "cpu", "cuda"))
    max_batch_tokens: int | None = positive(
        None, "tokens per forward pass at most, padding counted; None: 1024 on a CPU, 16384 on a GPU"
    )
    max_wait_ms: float = not_negative(2.0, "how long an idle model waits for more texts")
    max_texts: int = positive(2048, "texts per request at most")
    max_body_mb: float = positive(8.0, "size of a request at most")
    max_queue: int = positive(16384, "texts that may wait; further requests are answered 429")
    cache: str | None = setting(
        None, "SQLite file of embeddings; None: embeddings.sqlite in the cache folder; off: memory only"
    )
    cache_entries: int = positive(1_000_000, "embeddings kept on disk at most")


@dataclass
class DescribeConfig:
    """Descriptions by a chat model. Its address and key come from the environment: ``OPENAI_BASE_URL`` and
    ``OPENAI_API_KEY``."""

    source: str = setting(
        "task", "who describes experts: the tasks' own texts, or a chat model (llm)", ("task", "llm")
    )
    model: str | None = setting(None, "llm: the chat model; None: $OPENAI_MODEL")
    examples: int = positive(3, "llm: training examples that the model sees of each task")
    descriptions: int = positive(1, "llm: descriptions per expert")
    max_tokens: int = positive(512, "llm: length of the model's answer at most")
    temperature: float = not_negative(
        0.0, "llm: sampling temperature of the first try; later tries use 0.7 at least"
    )
    tries: int = positive(3, "llm: answers asked for until one is valid JSON")
    retries: int = not_negative(6, "llm: times a request is repeated when the endpoint fails or is busy")
    timeout: float = positive(60.0, "llm: seconds for one answer")
    workers: int = positive(4, "llm: requests under way at once")
    requests_per_minute: float = not_negative(0.0, "llm: requests per minute at most; 0: no limit")
    cache: str | None = setting(
        None, "llm: SQLite file of the model's answers; None: descriptions.sqlite in the cache folder; off: none"
    )
    queries: str = setting(
        "instruction", "what of a query is embedded: its instruction, or an llm's description of it",
        ("instruction", "llm"),
    )  # fmt: skip
    query_timeout: float = positive(
        10.0, "llm: seconds for a query's description; then its instruction is embedded"
    )
    pooling: str = setting("max", "over an expert's descriptions: largest or mean cosine", ("max", "mean"))
