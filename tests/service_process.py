"""A real embedding service in a process of its own, on a free port of loopback."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from small_jobs import environment, free_port, kill

from glider_dist.semantics.embedder import PACKAGED

MODEL = PACKAGED


@dataclass
class Service:
    """A started service; ``log`` has what it printed."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    token: str | None = None

    def http(self, **headers: str) -> httpx.Client:
        if self.token is not None:
            headers = {"Authorization": f"Bearer {self.token}", **headers}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False)

    def end(self) -> None:
        if self.process.poll() is None:
            kill(self.process)
        self.process.wait()

    def metric(self, name: str, **labels: str) -> float:
        """A counter's value; 0 if it has not been counted."""
        inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
        head = f"{name}{{{inside}}} " if inside else f"{name} "
        with self.http() as http:
            for line in http.get("/metrics").text.splitlines():
                if line.startswith(head):
                    return float(line[len(head) :])
        return 0.0


def start_service(
    folder: Path,
    *words: str,
    port: int | None = None,
    token: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Service:
    """Start a service and wait until it is ready; its cache and log are in ``folder``."""
    port = port or free_port()
    log = folder / "service.log"
    variables = environment(**{"GLIDER_DIST_SERVICE_TOKEN": token or "", **(env or {})})
    command = [
        sys.executable,
        "-m",
        "glider_dist",
        "serve-embeddings",
        f"service.port={port}",
        f"service.cache={folder / 'embeddings.sqlite'}",
        *words,
    ]
    with open(log, "a") as output:
        process = subprocess.Popen(
            command, env=variables, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    service = Service(f"http://127.0.0.1:{port}", process, log, token)
    wait_until_ready(service)
    return service


def wait_until_ready(service: Service, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    with service.http() as http:
        while time.monotonic() < deadline:
            assert service.process.poll() is None, service.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if http.get("/readyz").status_code == 200:
                    return
            time.sleep(0.1)
    raise AssertionError(f"not ready after {seconds} s\n{service.log.read_text()}")


@contextlib.contextmanager
def serving(folder: Path, *words: str, token: str | None = None) -> Iterator[Service]:
    folder.mkdir(parents=True, exist_ok=True)
    service = start_service(folder, *words, token=token)
    try:
        yield service
    finally:
        service.end()
