"""Endpoints that take fewer texts at once than a request has, and endpoints behind a proxy."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from glider_dist.errors import GliderError
from glider_dist.semantics.client import RemoteEmbedder, Unreachable
from glider_dist.semantics.settings import ServiceConfig

TEXTS = [f"text {i}" for i in range(300)]


@dataclass
class Endpoint:
    """Refuses as Text Embeddings Inference does; a text's embedding tells its number."""

    status: int = 422
    most: int = 32
    form: str = "error"
    sizes: list[int] = field(default_factory=list)
    url: str = ""

    def answer(self, texts: list[str]) -> tuple[int, dict[str, Any]]:
        self.sizes.append(len(texts))
        if len(texts) > self.most:
            message = f"batch size {len(texts)} > maximum allowed batch size {self.most}"
            more = {"error_type": "Validation"} if self.form == "error" else {"type": "Validation", "code": 422}
            return self.status, {self.form: message, **more}
        vectors = [[float(text.split()[1]), 1.0] for text in texts]
        return 200, {"data": [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(404, {"error": "not found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*state.answer(body["input"]))

        def _send(self, status: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def remote(endpoint: Endpoint, **settings: object) -> RemoteEmbedder:
    return RemoteEmbedder("some-model", endpoint.url, ServiceConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("status", [413, 422])
def test_an_endpoint_that_takes_32_texts_gets_no_more_once_it_has_said_so(endpoint: Endpoint, status: int):
    endpoint.status = status
    embedder = remote(endpoint)
    vectors = embedder.embed(TEXTS)
    expected = torch.tensor([[float(i), 1.0] for i in range(len(TEXTS))])
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(expected, dim=1))
    assert max(endpoint.sizes) == 128
    endpoint.sizes.clear()
    assert embedder.embed([f"text {i}" for i in range(1000, 1200)]).shape == (200, 2)
    # Halving 44 texts has left it at 22.
    assert max(endpoint.sizes) <= 32
    assert len(endpoint.sizes) <= 200 // 22 + 1


@pytest.mark.parametrize("form", ["error", "message"])
def test_one_text_that_is_too_large_is_refused_with_the_reason(endpoint: Endpoint, form: str):
    endpoint.most, endpoint.form = 0, form
    with pytest.raises(GliderError, match=r"status 422, batch size 1 > maximum allowed batch size 0$"):
        remote(endpoint).embed(TEXTS[:5])
    assert endpoint.sizes == [5, 3, 2, 1]


def test_other_refusals_are_not_repeated_with_fewer_texts(endpoint: Endpoint):
    endpoint.most, endpoint.status = 0, 400
    with pytest.raises(GliderError, match="status 400, batch size 5"):
        remote(endpoint).embed(TEXTS[:5])
    assert endpoint.sizes == [5]


@pytest.mark.parametrize("own", [True, False])
def test_the_environments_proxy_leads_to_given_endpoints_but_never_to_the_jobs_own(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, own: bool
):
    for name in ("no_proxy", "NO_PROXY", "http_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", endpoint.url)
    # No such name exists, so that only the proxy can answer.
    settings = ServiceConfig(timeout=0.1)
    embedder = RemoteEmbedder("some-model", "http://embeddings.invalid", settings, "token", own=own)
    if own:
        with pytest.raises(Unreachable):
            embedder.embed(["text 1"])
        assert endpoint.sizes == []
    else:
        assert embedder.embed(["text 1"]).shape == (1, 2)
        assert endpoint.sizes == [1]
