"""``service.url=auto``: the job's own embedding service, started by rank 0, restarted if it dies, ended with it.

Rank 0 holds the write end of a pipe that is the service's standard input. However rank 0 ends, ``kill -9``
included, the system closes the pipe and the service ends. Address and token travel in memory only.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from glider_dist.config import Config
from glider_dist.errors import GliderError
from glider_dist.semantics.service.access import PARENT, TOKEN, in_url

log = logging.getLogger(__name__)

_RESTARTS = 3
_STOP_SECONDS = 20.0
_BAD_INPUT = 2  # the exit code that another try would not change
_PASSED_ON = (
    "device", "max_batch_tokens", "max_wait_ms", "max_texts", "max_body_mb", "max_queue", "cache", "cache_entries",
)  # fmt: skip
# A process that believes it is a rank would wait for the others.
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Access:
    """Where the service is and what it wants to see."""

    url: str
    token: str


class OwnService:
    """A service process and the thread that watches it.

    Args:
        host: address to listen on.
        reached_at: where all ranks reach it, those of other nodes, too; None: ``host``.

    Raises:
        GliderError: the process ended before it had an address.
    """

    def __init__(self, cfg: Config, host: str, reached_at: str | None = None):
        self._cfg = cfg
        self._host = host
        self._token = secrets.token_urlsafe(32)
        self._stopping = threading.Event()
        self._process, url = self._start(0)
        self.access = Access(f"http://{in_url(reached_at or host)}:{urlsplit(url).port}", self._token)
        atexit.register(self.stop)
        threading.Thread(target=self._watch, name="embedding service", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id of the service as it runs now."""
        return self._process.pid

    def _start(self, port: int) -> tuple[subprocess.Popen[str], str]:
        """Start the service; once more if it is killed before it has an address."""
        for _ in range(_RESTARTS):
            process, url = self._try_start(port)
            if url:
                return process, url
            if process.wait() == _BAD_INPUT:
                break
        raise GliderError(f"the embedding service did not start (exit code {process.wait()})")

    def _try_start(self, port: int) -> tuple[subprocess.Popen[str], str]:
        cfg, settings = self._cfg, self._cfg.service
        given: dict[str, object] = {"embedder": cfg.embedder, "service.host": self._host, "service.port": port}
        given.update((f"service.{key}", getattr(settings, key)) for key in _PASSED_ON)
        words = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
        env = {key: value for key, value in os.environ.items() if key not in _OF_RANKS}
        process = subprocess.Popen(
            [sys.executable, "-m", "glider_dist", "serve-embeddings", *words],
            env={**env, TOKEN: self._token, PARENT: str(os.getpid())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the job, which then ends the service.
            start_new_session=True,
        )
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    def _watch(self) -> None:
        for _ in range(_RESTARTS):
            code = self._process.wait()
            if self._stopping.is_set() or code == _BAD_INPUT:
                return
            log.warning("the embedding service ended (exit code %s); it is started again", code)
            port = urlsplit(self.access.url).port
            try:
                self._process = self._start(port or 0)[0]
            except (GliderError, OSError) as error:
                log.warning("%s", error)
                return
            if self._stopping.is_set():
                self._end()
                return

    def stop(self) -> None:
        """End the service; a second call does nothing."""
        if not self._stopping.is_set():
            self._stopping.set()
            atexit.unregister(self.stop)
            self._end()

    def _end(self) -> None:
        process = self._process
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            process.kill()
            process.wait()
