"""The embedder behind an OpenAI-compatible endpoint: our service, vLLM, TEI or a hosted one."""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import torch

from glider_dist.errors import GliderError
from glider_dist.semantics.embedder import REMEMBERED, Embedder, embed_once, same_model
from glider_dist.semantics.service.access import is_loopback, keep_addresses_out_of_logs
from glider_dist.semantics.settings import ServiceConfig
from glider_dist.semantics.vectors import Recent

log = logging.getLogger(__name__)

_AT_ONCE = 8  # requests of one client under way together
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 120.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_TOO_LARGE = (413, 422)  # ours to too many texts; Text Embeddings Inference to more than 32, unless told otherwise


class Unreachable(GliderError):
    """The endpoint did not answer in time, however often it was asked."""


class _Refused(GliderError):
    def __init__(self, status: int, message: str):
        super().__init__(f"the embedding endpoint refuses: status {status}, {message}")
        self.status = status


class RemoteEmbedder:
    """Embeds texts, each asked for once. Safe to use from several threads.

    Args:
        name: the embedder's name, as the index notes it.
        url: base of the endpoint, with or without ``/v1``.
        token: bearer token, or None.
        fallback: what computes instead once the endpoint has stayed away for ``settings.timeout`` seconds; None
            raises then.
        own: the endpoint is the job's own service, which no proxy leads to.

    Raises:
        GliderError: the address is no http(s) URL or holds a user name or password.
    """

    def __init__(
        self,
        name: str,
        url: str,
        settings: ServiceConfig,
        token: str | None = None,
        fallback: Callable[[], Embedder] | None = None,
        own: bool = False,
    ):
        keep_addresses_out_of_logs()
        self.name = name
        self.settings = settings
        base = _checked(url)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            base_url=base,
            headers=headers,
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=_AT_ONCE, max_keepalive_connections=1, keepalive_expiry=30.0),
            # A proxy of the environment has no way to this machine's loopback, and no business with a job's token.
            trust_env=not (own or is_loopback(urlsplit(base).hostname or "")),
        )
        self._make_fallback = fallback
        self._fallback: Embedder | None = None
        self._request_texts = settings.request_texts
        self._recent = Recent(REMEMBERED)
        self._lock = threading.Lock()
        self._model: str | None = None
        self._fingerprint: str | None = None
        self._dimension: int | None = None
        self._example: tuple[str, torch.Tensor] | None = None

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """L2-normalised embeddings ``[len(texts), D]`` fp32 on the CPU.

        Raises:
            GliderError: the endpoint refuses, answers with something else than embeddings, changes its model,
                or (without fallback) does not answer.
        """
        with self._lock:
            return embed_once(self._recent, texts, self._compute)

    def fingerprint(self) -> str | None:
        """What the endpoint says identifies its model; None if it does not say."""
        with self._lock:
            self._or_fallback(self._identify, lambda local: None)
            return self._fingerprint if self._fallback is None else self._fallback.fingerprint()

    def close(self) -> None:
        self._http.close()

    def _compute(self, texts: list[str]) -> torch.Tensor:
        return self._or_fallback(lambda: self._ask_all(texts), lambda local: local.embed(texts))

    def _or_fallback(self, remote: Callable[[], Any], local: Callable[[Embedder], Any]) -> Any:
        if self._fallback is None:
            try:
                return remote()
            except Unreachable as error:
                if self._make_fallback is None:
                    raise
                log.warning("%s; from here on this process embeds by itself", error)
                self._fallback = self._checked_fallback(self._make_fallback())
        return local(self._fallback)

    def _checked_fallback(self, local: Embedder) -> Embedder:
        if self._fingerprint is not None:
            same = local.fingerprint() == self._fingerprint
        else:
            same = self._example is None or same_model(local.embed([self._example[0]]), self._example[1])
        if not same:
            raise GliderError(
                f"embedder {local.name!r} in this process is another model than the service's; "
                "start the service again, or set service.fallback=false and embedder= to the same model"
            )
        return local

    def _identify(self) -> None:
        """Choose the model and note its fingerprint."""
        if self._model is not None:
            return
        wanted = self.settings.model
        try:
            listed = self._ask("GET", "models")["data"]
            cards = {str(card["id"]): card for card in listed}
        except (KeyError, TypeError):
            cards = {}
        if wanted is None:
            short = self.name.rstrip("/").rsplit("/", 1)[-1]
            named = [name for name in (self.name, short) if name in cards]
            wanted = named[0] if named else next(iter(cards)) if len(cards) == 1 else self.name
        elif cards and wanted not in cards and len(cards) == 1:
            raise GliderError(f"the endpoint serves {next(iter(cards))!r}, not service.model={wanted!r}")
        card = cards.get(wanted, {})
        self._fingerprint = str(card["fingerprint"]) if card.get("fingerprint") else None
        self._model = wanted

    def _ask_all(self, texts: list[str]) -> torch.Tensor:
        self._identify()
        size = self._request_texts
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        if len(parts) == 1:
            return self._ask_part(parts[0])
        with ThreadPoolExecutor(min(len(parts), _AT_ONCE), "embed") as threads:
            return torch.cat(list(threads.map(self._ask_part, parts)))

    def _ask_part(self, texts: list[str]) -> torch.Tensor:
        """Ask for the texts, in several requests if the endpoint does not take so many at once."""
        size = self._request_texts
        if len(texts) > size:
            return torch.cat([self._ask_part(texts[start : start + size]) for start in range(0, len(texts), size)])
        try:
            return self._ask_vectors(texts)
        except _Refused as error:
            if error.status not in _TOO_LARGE or len(texts) == 1:
                raise
            log.info("%s; asked again with half of %d texts", error, len(texts))
        self._request_texts = min(self._request_texts, (len(texts) + 1) // 2)
        return self._ask_part(texts)

    def _ask_vectors(self, texts: list[str]) -> torch.Tensor:
        body = {"model": self._model, "input": texts, "encoding_format": "base64"}
        answer = self._ask("POST", "embeddings", body)
        try:
            rows = sorted(answer["data"], key=lambda row: int(row["index"]))
            vectors = np.stack([_decode(row["embedding"]) for row in rows])
        except (KeyError, TypeError, ValueError, binascii.Error):
            raise GliderError("the embedding endpoint's answer holds no embeddings; is it one?") from None
        if len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise GliderError(f"the embedding endpoint answered {len(vectors)} vectors for {len(texts)} texts")
        told = answer.get("system_fingerprint")
        if self._fingerprint is not None and told not in (None, self._fingerprint):
            raise GliderError("the embedding service has changed its model during this run; run index again")
        if self._dimension not in (None, vectors.shape[1]):
            raise GliderError(
                f"the embedding endpoint went from {self._dimension} to {vectors.shape[1]} dimensions"
            )
        self._dimension = int(vectors.shape[1])
        # Not every endpoint normalises.
        vectors_ND = torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1)
        self._example = (texts[0], vectors_ND[:1])
        return vectors_ND

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        reason = ""
        for pause in _pauses(self.settings.timeout):
            try:
                response = self._http.request(method, path, json=body)
            except httpx.TransportError as error:
                reason = type(error).__name__
            else:
                if response.status_code == 200:
                    return _json(response)
                reason = f"status {response.status_code}"
                if response.status_code not in _RETRIED:
                    if method == "GET" and response.status_code in (404, 405, 501):
                        return {}
                    raise _Refused(response.status_code, _message(response))
                with contextlib.suppress(ValueError):
                    told = min(float(response.headers.get("retry-after", "")), 30.0)
                    pause = max(pause, told * random.uniform(1.0, 1.5))
            time.sleep(pause)
        raise Unreachable(f"the embedding endpoint gave no answer within {self.settings.timeout:g} s ({reason})")


def _pauses(seconds: float) -> Iterator[float]:
    """Pauses that double, with jitter so that ranks do not come back together, until ``seconds`` are over."""
    deadline = time.monotonic() + seconds
    pause = _FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.5, 1.0)
        if time.monotonic() >= deadline:
            return
        pause = min(2 * pause, _LONGEST_PAUSE)


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise GliderError("service.url must be auto or start with http:// or https://")
    if parts.username or parts.password or parts.query:
        raise GliderError("service.url must hold no credentials; the token comes from the environment or a file")
    base = url.rstrip("/")
    return f"{base if base.endswith('/v1') else base + '/v1'}/"


def _decode(embedding: Any) -> np.ndarray:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4").copy()
    return np.asarray(embedding, dtype=np.float32)


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise GliderError("the embedding endpoint does not answer in JSON; is service.url right?")
    return value


def _message(response: httpx.Response) -> str:
    try:
        error = response.json()
    except ValueError:
        error = None
    # OpenAI: {"error": {"message": ...}}; Text Embeddings Inference: {"error": ...} or {"message": ...}.
    for name in ("error", "message"):
        if isinstance(error, dict):
            error = error.get(name, error)
    text = error if isinstance(error, str) else response.text
    return text[:200].strip() or "without a reason"
