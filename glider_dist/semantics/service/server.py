"""``glider-dist serve-embeddings``: the service as a process, started by hand or by rank 0 of a job.

Started by hand it prints its address. Started by a job (``GLIDER_DIST_SERVICE_PARENT`` holds the job's process id)
its standard input is a pipe whose other end the job holds: when the job ends, in whatever way, the pipe closes
and the service ends, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.model.cache import cache_dir
from glider_dist.parallel.launch import open_many_files
from glider_dist.parallel.stopping import SIGNALS
from glider_dist.semantics.cache_file import CacheFile
from glider_dist.semantics.embedder import Embedder, batch_tokens
from glider_dist.semantics.service.access import PARENT, TOKEN, in_url, is_loopback, read_token
from glider_dist.semantics.settings import ServiceConfig

log = logging.getLogger(__name__)

_BODY_SECONDS = 30.0
_DRAIN_SECONDS = 15
_MOST_CONNECTIONS, _OTHER_FILES = 1 << 16, 128


def run(cfg: Config) -> int:
    """Serve until SIGTERM, SIGINT or the end of the job that started it.

    Raises:
        GliderError: missing packages, no token though others can connect, an address in use, a model that
            cannot be loaded.
    """
    try:
        import uvicorn

        from glider_dist.semantics.service.app import Limits, Served, make_app
        from glider_dist.semantics.service.metrics import Metrics
        from glider_dist.semantics.service.protocol import KEEP_ALIVE_SECONDS, PatientProtocol
    except ImportError as error:
        raise GliderError(f"{error.name} is missing: pip install 'glider_dist[serve]'") from None
    settings = cfg.service
    token = read_token(settings)
    if token is None and not is_loopback(settings.host):
        raise GliderError(
            f"service.host={settings.host} can be reached from other machines, so a token is needed: "
            f"set {TOKEN} or service.token_file"
        )
    if settings.max_queue < settings.max_texts:
        raise GliderError(
            f"service.max_queue={settings.max_queue} can never take a request of service.max_texts="
            f"{settings.max_texts}; raise one or lower the other"
        )
    model = Embedder(cfg.embedder, _device(settings.device))
    served = Served(Path(cfg.embedder).name)
    metrics = Metrics()
    failure: list[BaseException] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        # Health and readiness answer while the model is being loaded.
        loading = asyncio.create_task(_load(model, served, metrics, settings))

        def loaded(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                failure.append(error)
                server.should_exit = True

        loading.add_done_callback(loaded)
        yield
        loading.cancel()
        if served.batcher is not None:
            await served.batcher.close()

    limits = Limits(settings.max_texts, int(settings.max_body_mb * 1e6), _BODY_SECONDS)
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(served, limits, token, metrics, lifespan),
            http=PatientProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            # It counts connections, idle ones too, of which each rank of a job keeps some.
            limit_concurrency=min(_MOST_CONNECTIONS, max(open_many_files() - _OTHER_FILES, _OTHER_FILES)),
            backlog=4096,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        )
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    # On SIGTERM uvicorn drains and then raises it again for the handler that was there before it. The others a
    # scheduler sends to the whole job; what they mean, the ranks know. No SIG_IGN, which child processes inherit.
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    with _listen(settings.host, settings.port) as listener:
        address = f"http://{in_url(settings.host)}:{listener.getsockname()[1]}"
        if parent := os.environ.get(PARENT):
            threading.Thread(target=_end_with, args=(int(parent), server), daemon=True).start()
            print(address, flush=True)
        else:
            demands = "a bearer token is demanded" if token else "this machine only, no token"
            print(f"embeddings of {served.id} at {address}/v1 ({demands})", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    if failure:
        raise failure[0]
    if parent:
        # Answers are out and the cache is closed. Taking the interpreter down can last seconds on a busy machine.
        os._exit(0)
    return 0


async def _load(model: Embedder, served: Any, metrics: Any, settings: ServiceConfig) -> None:
    from glider_dist.semantics.service.batching import Batcher

    loop = asyncio.get_running_loop()
    vectors = await loop.run_in_executor(None, model.compute, ["ready"])
    fingerprint = await loop.run_in_executor(None, model.fingerprint)
    file = None
    if settings.cache != "off":
        file = await loop.run_in_executor(None, CacheFile, cache_path(settings), settings.cache_entries)
    batcher = Batcher(
        model,
        metrics,
        settings.max_batch_tokens or batch_tokens(model.device),
        settings.max_wait_ms / 1000,
        settings.max_queue,
        file,
    )
    batcher.start()
    served.fingerprint, served.dimension = fingerprint, int(vectors.shape[1])
    served.batcher = batcher
    log.info("%s is ready: %d dimensions, fingerprint %s", served.id, served.dimension, fingerprint[:12])


def cache_path(settings: ServiceConfig) -> Path:
    """The cache of embeddings on disk."""
    if settings.cache:
        return Path(settings.cache)
    return cache_dir() / "embeddings.sqlite"


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise GliderError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def _end_with(parent: int, server: Any) -> None:
    """Stop when the job's end of the pipe closes, or its process is gone though a fork of it holds the pipe."""
    while os.getppid() == parent:
        if select.select([sys.stdin], [], [], 1.0)[0] and not os.read(sys.stdin.fileno(), 1024):
            break
    server.should_exit = True
    # The job waits for nothing any more; a drain that hangs must not keep the process.
    last = threading.Timer(_DRAIN_SECONDS + 5, os._exit, (1,))
    last.daemon = True
    last.start()
