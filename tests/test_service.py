"""The embedding service over real HTTP: what it answers, whom it answers, and what it survives."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from service_process import MODEL, Service, serving, start_service
from small_jobs import command, free_port

from glider_dist.parallel.launch import open_many_files
from glider_dist.semantics.client import RemoteEmbedder
from glider_dist.semantics.embedder import Embedder
from glider_dist.semantics.settings import ServiceConfig

TEXTS = ["Translate to French", "", "Is the review positive or negative?", "naïve café ☕ 模型", "word " * 3000]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service"), "service.max_texts=64", "service.max_body_mb=0.5") as running:
        yield running


@pytest.fixture(scope="module")
def local() -> Embedder:
    return Embedder(MODEL)


def client(service: Service, **settings: object) -> openai.OpenAI:
    settings = {"api_key": service.token or "none", "max_retries": 0, **settings}
    return openai.OpenAI(base_url=f"{service.url}/v1", **settings)  # type: ignore[arg-type]


def post(service: Service, **body: object) -> httpx.Response:
    with service.http() as http:
        return http.post("/v1/embeddings", json={"model": MODEL, "input": "hello", **body})


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_the_openai_client_gets_what_the_model_computes(service: Service, local: Embedder, encoding: str | None):
    settings = {} if encoding is None else {"encoding_format": encoding}
    answer = client(service).embeddings.create(model=MODEL, input=TEXTS, **settings)  # type: ignore[arg-type]
    rows: list[Any] = [row.embedding for row in answer.data]
    if encoding == "base64":  # asked for in so many words, the client leaves it as it is
        rows = [np.frombuffer(base64.b64decode(row), dtype="<f4").tolist() for row in rows]
    vectors = torch.tensor(rows)
    assert [row.index for row in answer.data] == list(range(len(TEXTS)))
    torch.testing.assert_close(vectors, local.compute(TEXTS), rtol=0, atol=1e-5)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)), rtol=0, atol=1e-5)
    assert answer.usage.prompt_tokens == sum(local.lengths(TEXTS))
    assert answer.model_extra == {"system_fingerprint": local.fingerprint()}


def test_float_and_base64_hold_the_same_bits(service: Service):
    plain = post(service).json()["data"][0]["embedding"]
    packed = post(service, encoding_format="base64").json()["data"][0]["embedding"]
    assert np.array(plain, dtype="<f4").tobytes() == base64.b64decode(packed)


def test_the_one_model_is_listed_and_any_other_is_unknown(service: Service, local: Embedder):
    listed = client(service).models.list().data
    assert [card.id for card in listed] == [MODEL]
    assert (
        client(service).models.retrieve(MODEL).model_extra
        == {
            "fingerprint": local.fingerprint(),
            "dimension": 384,
            "shutdown_date": None,
        }
        or listed[0].model_extra["fingerprint"] == local.fingerprint()
    )  # type: ignore[index]
    for name in (
        "other",
        "../../etc/passwd",
        "/etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "",
        "a" * 5000,
        "\x00",
        None,
        7,
    ):
        answer = post(service, model=name)
        assert answer.status_code == 404
        assert "embedding" not in answer.json()
        assert len(answer.content) < 1000
    with service.http() as http:
        for path in (
            "/v1/models/../../etc/passwd",
            "/v1/models/%2e%2e/%2e%2e/etc/passwd",
            "/docs",
            "/openapi.json",
        ):
            assert http.get(path).status_code == 404


def test_identical_texts_are_computed_once(service: Service):
    before = service.metric("glider_embedding_texts_total", source="computed")
    text = "a sentence that no other test sends"

    def ask(_: int) -> bytes:
        return post(service, input=[text, text, text], encoding_format="base64").content

    with ThreadPoolExecutor(16) as threads:
        answers = set(threads.map(ask, range(16)))
    assert len(answers) == 1
    assert service.metric("glider_embedding_texts_total", source="computed") == before + 1


def test_requests_of_many_clients_share_batches(service: Service):
    batches = service.metric("glider_embedding_batch_texts_count")
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda i: post(service, input=[f"client {i} text {j}" for j in range(4)]), range(16)))
    assert service.metric("glider_embedding_batch_texts_count") - batches < 16


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1, 2]", 400),
        (b'"text"', 400),
        (b"[" * 100_000, 400),
        (b'{"model": "all-minilm-l6-v2", "input": "\xff\xfe"}', 400),
        (b'{"model": "all-minilm-l6-v2", "input": "\\ud800"}', 400),
        (b'{"model": "all-minilm-l6-v2", "input": []}', 400),
        (b'{"model": "all-minilm-l6-v2"}', 400),
        (b'{"model": "all-minilm-l6-v2", "input": null}', 400),
        (b'{"model": "all-minilm-l6-v2", "input": [1, 2, 3]}', 400),
        (b'{"model": "all-minilm-l6-v2", "input": [["a"]]}', 400),
        (b'{"model": "all-minilm-l6-v2", "input": {"a": 1}}', 400),
        (b'{"model": "all-minilm-l6-v2", "input": "a", "dimensions": 7}', 400),
        (b'{"model": "all-minilm-l6-v2", "input": "a", "encoding_format": "int8"}', 400),
        (b'{"model": "all-minilm-l6-v2", "input": "a", "dimensions": ' + b"1" * 100_000 + b"}", 400),
        (b'{"input": "a"}', 404),
    ],
)
def test_a_bad_body_is_refused_in_openai_form(service: Service, body: bytes, status: int):
    with service.http() as http:
        answer = http.post("/v1/embeddings", content=body)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert {"message", "type", "param", "code"} == set(answer.json()["error"])


def test_too_many_texts_and_too_large_a_body_are_refused(service: Service):
    assert post(service, input=["x"] * 65).status_code == 413
    assert post(service, input=["x"] * 64).status_code == 200
    assert post(service, input="x" * 600_000).status_code == 413

    def endless() -> Iterator[bytes]:
        yield b'{"model": "all-minilm-l6-v2", "input": "'
        for _ in range(100):
            yield b"x" * 10_000
        yield b'"}'

    with service.http() as http:
        try:
            status = http.post("/v1/embeddings", content=endless()).status_code
        except httpx.WriteError:  # the service has closed the connection on a body without a length
            status = 413
        assert status == 413
        assert http.get("/healthz").json() == {"status": "ok"}


def test_our_client_asks_for_fewer_texts_where_the_service_takes_fewer(service: Service, local: Embedder):
    texts = [f"text {i}" for i in range(100)]
    asking = RemoteEmbedder(MODEL, service.url, ServiceConfig(request_texts=100), service.token)
    torch.testing.assert_close(asking.embed(texts), local.embed(texts), rtol=0, atol=1e-5)


def test_a_full_queue_is_answered_with_429_and_when_to_come_back(tmp_path: Path):
    with serving(tmp_path, "service.max_queue=64", "service.max_texts=64") as small:

        def ask(i: int) -> httpx.Response:
            return post(small, input=[f"{i} {j} " + "many words " * 100 for j in range(32)])

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(ask, range(8)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert len(refused) < len(answers)
        assert {answer.status_code for answer in answers} == {200, 429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert ask(0).status_code == 200


def test_without_the_token_there_is_no_embedding_and_no_secret_in_the_log(tmp_path: Path):
    secret = "s3cret-token-of-this-test"
    with serving(tmp_path, token=secret) as guarded:
        good = client(guarded).embeddings.create(model=MODEL, input="hello").data
        assert len(good[0].embedding) == 384
        headers: list[dict[str, str]] = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": secret}]
        headers += [
            {"Authorization": f"Basic {secret}"},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer é"},
        ]
        headers += [{"Authorization": f"Bearer {secret}x"}, {"Authorization": f"Bearer {secret[:-1]}"}]
        with httpx.Client(base_url=guarded.url, trust_env=False) as http:
            for each in headers:
                encoded = {key: value.encode() for key, value in each.items()}
                answer = http.post("/v1/embeddings", json={"model": MODEL, "input": "hello"}, headers=encoded)
                assert answer.status_code == 401, each
                assert "embedding" not in answer.text
            for path in ("/v1/models", "/metrics", "/v1/embeddings", "/anything"):
                assert http.get(path).status_code == 401
            assert http.get("/healthz").status_code == 200
            assert http.get("/readyz").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            client(guarded, api_key="wrong").embeddings.create(model=MODEL, input="hello")
    assert secret not in guarded.log.read_text()


def test_on_loopback_without_a_token_an_authorization_header_is_ignored(service: Service):
    with service.http(Authorization="Bearer whatever") as http:
        assert http.post("/v1/embeddings", json={"model": MODEL, "input": "hello"}).status_code == 200


def test_an_address_that_others_can_reach_needs_a_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GLIDER_DIST_SERVICE_TOKEN", raising=False)
    for host in ("0.0.0.0", "'::'", "10.1.2.3"):
        done = command("serve-embeddings", f"service.host={host}", f"service.port={free_port()}")
        assert done.code == 2
        assert "a token is needed" in done.errors[0]


def test_an_address_in_use_is_one_sentence(service: Service):
    port = service.url.rsplit(":", 1)[1]
    done = command("serve-embeddings", f"service.port={port}")
    assert (done.code, len(done.errors)) == (2, 1)
    assert f"port {port}" in done.errors[0]


def test_a_model_that_cannot_be_loaded_ends_the_service(tmp_path: Path):
    done = command(
        "serve-embeddings", f"embedder={tmp_path}/none", f"service.port={free_port()}", "service.cache=off"
    )
    assert done.code == 2
    assert "cannot be loaded" in done.errors[0]


def test_slow_and_half_open_connections_are_closed_and_stop_nobody(service: Service):
    host, port = service.url[len("http://") :].split(":")
    held = [socket.create_connection((host, int(port))) for _ in range(50)]
    try:
        for each in held[:20]:
            each.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Le")
        for each in held[20:30]:
            each.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        for each in held[30:35]:
            each.sendall(b"\x00\xff not HTTP at all\r\n\r\n")
        assert post(service).status_code == 200
        deadline = time.monotonic() + 30
        for each in held[:20] + held[35:]:
            each.settimeout(max(deadline - time.monotonic(), 0.1))
            # Closed by the service: an end of file or a reset, and not a time-out.
            with contextlib.suppress(ConnectionResetError):
                assert each.recv(1000) == b""
    finally:
        for each in held:
            each.close()
    assert post(service).status_code == 200


@pytest.mark.parametrize("head", [b"a: b\r\n" * 100_000, b"a: " + b"b" * 600_000], ids=["many", "long"])
def test_a_head_without_end_is_cut_off(head: bytes, service: Service):
    host, port = service.url[len("http://") :].split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(5)  # well before a slow head is given up
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\n" + head)
            assert connection.recv(1000) == b""
    assert post(service).status_code == 200


def test_the_clients_of_more_than_a_thousand_ranks_may_stay_connected(service: Service):
    if open_many_files() < 2000:
        pytest.skip("this process may not open enough files")
    host, port = service.url[len("http://") :].split(":")
    with contextlib.ExitStack() as held:
        for _ in range(1100):
            connection = held.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert post(service).status_code == 200


def test_the_cache_outlives_the_service_and_a_damaged_one_is_replaced(tmp_path: Path):
    with serving(tmp_path) as first:
        before = post(first, input=TEXTS, encoding_format="base64").json()["data"]
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(60) == 0
    with serving(tmp_path) as second:
        assert post(second, input=TEXTS, encoding_format="base64").json()["data"] == before
        assert second.metric("glider_embedding_texts_total", source="disk") == len(TEXTS)
        assert second.metric("glider_embedding_texts_total", source="computed") == 0
    assert (tmp_path / "embeddings.sqlite").stat().st_mode & 0o077 == 0
    for file in tmp_path.glob("embeddings.sqlite*"):
        file.write_bytes(b"this is no database" * 1000)
    with serving(tmp_path) as third:
        assert post(third, input=TEXTS).status_code == 200
        assert third.metric("glider_embedding_texts_total", source="computed") == len(TEXTS)
        assert "is damaged" in third.log.read_text()


def test_requests_under_way_are_answered_before_the_service_ends(tmp_path: Path):
    service = start_service(tmp_path)
    try:
        with ThreadPoolExecutor(4) as threads:
            answers = [
                threads.submit(post, service, input=[f"{i} {j} " + "words " * 60 for j in range(32)])
                for i in range(4)
            ]
            time.sleep(0.3)
            os.kill(service.process.pid, signal.SIGTERM)
            assert [answer.result().status_code for answer in answers] == [200] * 4
        assert service.process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            post(service)
    finally:
        service.end()
