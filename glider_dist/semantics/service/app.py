"""The HTTP interface of the embedding service: OpenAI's ``/v1/embeddings`` and ``/v1/models``, health, metrics."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import math
import time
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as RoutingError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from glider_dist.semantics.service.batching import Batcher, QueueFull
from glider_dist.semantics.vectors import tokens_of, vector_of

log = logging.getLogger(__name__)
OPEN = ("/healthz", "/readyz")  # the routes that need no token


@dataclass(frozen=True)
class Limits:
    """What one request may ask."""

    max_texts: int
    max_body: int  # bytes
    body_seconds: float


@dataclass
class Served:
    """The one model of a service; ``batcher`` is None until it is loaded."""

    id: str
    fingerprint: str = ""
    dimension: int = 0
    batcher: Batcher | None = None


class BearerToken:
    """Demands a bearer token before anything else of a request is looked at."""

    def __init__(self, app: ASGIApp, token: str):
        self.app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
                refusal = _refusal(Refused(401, "a valid bearer token is needed", "invalid_api_key", headers))
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Refused(HTTPException):
    """An answer other than 200, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(status, message, headers)
        self.code = code


def make_app(served: Served, limits: Limits, token: str | None, metrics: Any, lifespan: Any) -> FastAPI:
    """The application.

    Args:
        token: the bearer token that every route but those in ``OPEN`` demands; None demands none.
    """
    app = FastAPI(
        title="glider_dist embeddings", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    if token is not None:
        app.add_middleware(BearerToken, token=token)

    @app.exception_handler(RoutingError)
    async def refused(_: Request, error: RoutingError) -> Response:
        return _refusal(error)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> Response:
        ready = served.batcher is not None
        return JSONResponse({"status": "ready" if ready else "loading"}, 200 if ready else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def card() -> dict[str, Any]:
        return {
            "id": served.id,
            "object": "model",
            "created": 0,
            "owned_by": "glider_dist",
            "fingerprint": served.fingerprint,
            "dimension": served.dimension,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        _loaded(served)
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _loaded(served)
        _check_model(served, name)
        return card()

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        started = time.perf_counter()
        status = 500
        try:
            batcher = _loaded(served)
            body = await _read_body(request, limits)
            texts, encoding = _parse(body, served, limits)
            try:
                entries = await batcher.embed(texts)
            except QueueFull as full:
                headers = {"Retry-After": str(math.ceil(full.retry_after))}
                raise Refused(429, "too many texts wait; try again later", "queue_full", headers) from None
            except asyncio.CancelledError:
                raise
            except Exception as error:
                raise Refused(500, "the model failed on this text or its batch; see the service's log") from error
            status = 200
            return Response(_answer(served, entries, encoding), media_type="application/json")
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            metrics.requests.labels(str(status)).inc()
            metrics.seconds.observe(time.perf_counter() - started)

    return app


def _refusal(error: RoutingError) -> Response:
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    content = {"message": str(error.detail), "type": kind, "param": None, "code": getattr(error, "code", None)}
    return JSONResponse({"error": content}, error.status_code, headers=dict(error.headers or {}))


def _loaded(served: Served) -> Batcher:
    if served.batcher is None:
        raise Refused(503, "the model is being loaded", "loading", {"Retry-After": "1"})
    return served.batcher


async def _read_body(request: Request, limits: Limits) -> bytes:
    close = {"Connection": "close"}
    too_large = Refused(413, f"the body is larger than {limits.max_body} bytes", None, close)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limits.max_body:
        raise too_large

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limits.max_body:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), limits.body_seconds)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body did not arrive within {limits.body_seconds:g} s", None, close) from None
    except ClientDisconnect:
        raise Refused(400, "the connection was closed before the body was complete") from None


def _check_model(served: Served, name: object) -> None:
    if name != served.id:
        raise Refused(404, f"there is no model {str(name)[:100]!r} here, only {served.id!r}", "model_not_found")


def _parse(body: bytes, served: Served, limits: Limits) -> tuple[list[str], str]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body must be an object with model and input")
    _check_model(served, value.get("model"))
    encoding = value.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise Refused(400, "encoding_format must be float or base64")
    if value.get("dimensions") not in (None, served.dimension):
        raise Refused(400, f"this model has {served.dimension} dimensions, and they cannot be chosen")
    texts = value.get("input")
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Refused(400, "input must be a string or a list of strings, at least one; token ids are not taken")
    if len(texts) > limits.max_texts:
        raise Refused(413, f"{len(texts)} texts in one request, but at most {limits.max_texts} are taken")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise Refused(400, "a text holds half of a surrogate pair") from None
    return texts, encoding


def _answer(served: Served, entries: list[bytes], encoding: str) -> bytes:
    def plain(entry: bytes) -> Any:
        vector = vector_of(entry)
        return base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()

    tokens = sum(tokens_of(entry) for entry in entries)
    data = [{"object": "embedding", "index": i, "embedding": plain(entry)} for i, entry in enumerate(entries)]
    value = {
        "object": "list",
        "data": data,
        "model": served.id,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "system_fingerprint": served.fingerprint,
    }
    return json.dumps(value, separators=(",", ":")).encode()
