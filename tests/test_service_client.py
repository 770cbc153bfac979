"""The client of an embedding endpoint against real services: the same vectors, and what happens when they fail."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from service_process import MODEL, Service, serving, start_service
from small_jobs import command, free_port

from glider_dist.errors import GliderError
from glider_dist.pool import ExpertPool
from glider_dist.semantics.client import RemoteEmbedder, Unreachable
from glider_dist.semantics.embedder import Embedder
from glider_dist.semantics.global_router import GlobalRouter
from glider_dist.semantics.index import FILE, IndexSettings, read_index, save_index
from glider_dist.semantics.indexing import build_index, known_vectors
from glider_dist.semantics.settings import ServiceConfig
from glider_dist.testing import random_pool, tiny_causal

TEXTS = [f"Write the plural of the word, form {i}." for i in range(40)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture(scope="module")
def local() -> Embedder:
    return Embedder(MODEL)


@pytest.fixture
def pool(tmp_path: Path, local: Embedder) -> ExpertPool:
    pool = random_pool(tmp_path / "pool", tiny_causal(), 3)
    for place, expert in enumerate(pool.experts()):
        expert.update_card(descriptions=[f"This expert knows {what}." for what in (TEXTS[place], "things")])
    texts = {expert.name: list(expert.card()["descriptions"]) for expert in pool.experts()}
    save_index(build_index(texts, local)[0], pool.router_dir / FILE)
    return pool


def remote(
    url: str, *, token: str | None = None, local: Embedder | None = None, **settings: object
) -> RemoteEmbedder:
    fallback = None if local is None else lambda: local
    return RemoteEmbedder(MODEL, url, ServiceConfig(**settings), token, fallback)  # type: ignore[arg-type]


def without_fingerprint(embedder: RemoteEmbedder) -> RemoteEmbedder:
    """As vLLM and hosted endpoints leave it out."""
    embedder._identify()
    embedder._fingerprint = None
    return embedder


def test_vectors_and_fingerprint_are_those_of_the_model(service: Service, local: Embedder):
    for url in (service.url, f"{service.url}/", f"{service.url}/v1", f"{service.url}/v1/"):
        embedder = remote(url, request_texts=7)
        torch.testing.assert_close(embedder.embed(TEXTS), local.embed(TEXTS), rtol=0, atol=1e-5)
        assert embedder.fingerprint() == local.fingerprint()
    assert embedder.embed([]).shape == (0, 0)


def test_a_text_is_asked_for_once(service: Service):
    embedder = remote(service.url)
    embedder.embed(["one", "two", "one"])
    before = service.metric("glider_embedding_requests_total", status="200")
    embedder.embed(["two", "one", "two"])
    assert service.metric("glider_embedding_requests_total", status="200") == before


def test_a_wrong_token_is_not_repeated_and_not_shown(tmp_path: Path):
    with serving(tmp_path, token="right-token") as guarded:
        assert remote(guarded.url, token="right-token").embed(["a"]).shape == (1, 384)
        started = time.monotonic()
        with pytest.raises(GliderError, match="401") as caught:
            remote(guarded.url, token="wrong-token", local=Embedder(MODEL)).embed(["a"])
        assert time.monotonic() - started < 5
        assert "wrong-token" not in str(caught.value)


@pytest.mark.slow
def test_a_busy_service_is_asked_again_until_it_has_time(tmp_path: Path):
    with serving(tmp_path, "service.max_queue=64", "service.max_texts=64", "service.cache=off") as small:
        results: list[torch.Tensor] = []

        def ask(i: int) -> None:
            texts = [f"{i} {j} " + "many words " * 20 for j in range(96)]
            results.append(remote(small.url, request_texts=32).embed(texts))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [tuple(result.shape) for result in results] == [(96, 384)] * 4
        assert small.metric("glider_embedding_requests_total", status="429") > 0


def test_a_service_killed_and_started_again_loses_nothing(tmp_path: Path, local: Embedder):
    port = free_port()
    service = start_service(tmp_path, port=port)
    results: list[torch.Tensor] = []
    embedder = remote(service.url, request_texts=4)

    def ask() -> None:
        for text in TEXTS:
            results.append(embedder.embed([text]))

    asking = threading.Thread(target=ask)
    try:
        asking.start()
        while len(results) < 5:
            time.sleep(0.01)
        service.process.kill()
        service.process.wait()
        time.sleep(0.5)
        service = start_service(tmp_path, port=port)
        asking.join(120)
        assert len(results) == len(TEXTS)
        torch.testing.assert_close(torch.cat(results), local.embed(TEXTS), rtol=0, atol=1e-5)
    finally:
        service.end()


def test_the_model_in_this_process_stands_in_and_says_so_once(local: Embedder, caplog: pytest.LogCaptureFixture):
    embedder = remote(f"http://127.0.0.1:{free_port()}", local=local, timeout=0.5)
    with caplog.at_level(logging.WARNING):
        for text in TEXTS[:3]:
            torch.testing.assert_close(embedder.embed([text]), local.embed([text]))
    assert len([record for record in caplog.records if "this process embeds" in record.message]) == 1
    assert embedder.fingerprint() == local.fingerprint()


def test_without_fallback_a_missing_service_is_one_sentence():
    with pytest.raises(GliderError, match=r"no answer within 0\.5 s"):
        remote(f"http://127.0.0.1:{free_port()}", timeout=0.5).embed(["a"])


@pytest.mark.parametrize(
    "url", ["ftp://x", "127.0.0.1:80", "http://user:pw@127.0.0.1:1", "http://h/v1?key=secret"]
)
def test_an_address_with_secrets_or_without_http_is_refused(url: str):
    with pytest.raises(GliderError, match=r"service\.url") as caught:
        remote(url)
    assert "secret" not in str(caught.value)
    assert "pw" not in str(caught.value)


def test_scores_through_the_service_are_those_of_the_process(service: Service, pool: ExpertPool, local: Embedder):
    here = GlobalRouter(pool, local).similarity(TEXTS)
    there = GlobalRouter(pool, remote(service.url)).similarity(TEXTS)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)


def test_an_index_of_other_weights_is_refused(service: Service, pool: ExpertPool):
    path = pool.router_dir / FILE
    index = read_index(path)
    save_index(replace(index, fingerprint="0" * 64), path)
    with pytest.raises(GliderError, match="not those that made the index"):
        GlobalRouter(pool, remote(service.url)).similarity(["a"])


@pytest.mark.parametrize("silent", ["index", "endpoint"])
def test_where_index_or_endpoint_has_no_fingerprint_another_model_is_refused(
    service: Service, pool: ExpertPool, local: Embedder, silent: str
):
    path = pool.router_dir / FILE
    index = read_index(path)
    other = replace(index, embeddings=index.embeddings.roll(1, dims=1))
    embedder: RemoteEmbedder | Embedder = local
    if silent == "index":
        index, other = replace(index, fingerprint=""), replace(other, fingerprint="")
    else:
        embedder = without_fingerprint(remote(service.url))
    save_index(index, path)
    assert GlobalRouter(pool, embedder).similarity(["a"]).shape == (1, 3)
    save_index(other, path)
    with pytest.raises(GliderError, match="unlike the index"):
        GlobalRouter(pool, embedder).similarity(["a"])


def test_an_index_without_a_fingerprint_is_made_anew_for_another_model(pool: ExpertPool, local: Embedder):
    old = replace(read_index(pool.router_dir / FILE), fingerprint="")
    texts = {expert.name: list(expert.card()["descriptions"]) for expert in pool.experts()}
    wanted = [text for one in texts.values() for text in one]
    assert build_index(texts, local, known=known_vectors(old, local, wanted))[1] == 0
    other = replace(old, embeddings=old.embeddings.roll(1, dims=1))
    assert build_index(texts, local, known=known_vectors(other, local, wanted))[1] == len(set(wanted))


def test_another_model_does_not_stand_in_for_an_endpoint_without_a_fingerprint(tmp_path: Path, local: Embedder):
    class Other(Embedder):
        def compute(self, texts: Sequence[str]) -> torch.Tensor:
            return super().compute(texts).roll(1, dims=1)

    service = start_service(tmp_path)
    try:
        embedders = [
            without_fingerprint(remote(service.url, local=stand_in, timeout=0.5))
            for stand_in in (local, Other(MODEL))
        ]
        for embedder in embedders:
            embedder.embed(["a"])
    finally:
        service.end()
    assert embedders[0].embed(["b"]).shape == (1, 384)
    with pytest.raises(GliderError, match="another model than the service's"):
        embedders[1].embed(["b"])


def test_prefixes_are_stored_with_the_index_and_checked(pool: ExpertPool, local: Embedder):
    texts = {expert.name: list(expert.card()["descriptions"]) for expert in pool.experts()}
    settings = IndexSettings("query: ", "passage: ", "mean")
    save_index(build_index(texts, local, settings)[0], pool.router_dir / FILE)
    scores = GlobalRouter(pool, local, settings).similarity(["hello"])
    rows = local.embed([f"passage: {text}" for text in texts[pool.names[0]]])
    expected = (rows @ local.embed(["query: hello"])[0]).mean()
    torch.testing.assert_close(scores[0, 0], expected, rtol=0, atol=1e-5)
    with pytest.raises(GliderError, match="query_prefix"):
        GlobalRouter(pool, local, IndexSettings())


def test_only_new_descriptions_are_embedded(pool: ExpertPool, local: Embedder):
    old = read_index(pool.router_dir / FILE)
    texts = {expert.name: list(expert.card()["descriptions"]) for expert in pool.experts()}
    known = known_vectors(old, local, texts["expert_1"])
    same, embedded = build_index(texts, local, known=known)
    assert embedded == 0
    assert torch.equal(same.embeddings, old.embeddings)
    texts["expert_9"] = ["Something quite new."]
    del texts["expert_0"]
    changed, embedded = build_index(texts, local, known=known)
    assert embedded == 1
    torch.testing.assert_close(changed.embeddings, build_index(texts, local)[0].embeddings, rtol=0, atol=1e-5)
    assert build_index(texts, local, IndexSettings(description_prefix="x "), known)[1] == len(changed.owner) - 1


def test_an_endpoint_that_is_away_for_a_while_is_not_asked_for_everything_again(
    service: Service, pool: ExpertPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pool.expert("expert_0").update_card(descriptions=["Something quite new."])
    before = (pool.router_dir / FILE).read_bytes()
    answers = iter([Unreachable("the endpoint is away")])

    def fingerprint(self: RemoteEmbedder) -> str | None:
        for error in answers:
            raise error
        return self._fingerprint

    monkeypatch.setattr(RemoteEmbedder, "fingerprint", fingerprint)
    words = (f"service.url={service.url}", f"run_dir={tmp_path / 'run'}", "tracking=off", "device=cpu")
    outcome = command("index", f"pool={pool.path}", *words)
    assert outcome.code == 2
    assert "the endpoint is away" in outcome.errors[0]
    assert (pool.router_dir / FILE).read_bytes() == before


def test_the_index_stage_uses_the_service_of_the_environment(
    service: Service, pool: ExpertPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GLIDER_DIST_SERVICE_URL", service.url)
    (pool.router_dir / FILE).unlink()
    before = service.metric("glider_embedding_requests_total", status="200")
    done = command("index", f"pool={pool.path}", f"run_dir={tmp_path / 'run'}", "tracking=off", "device=cpu")
    assert done.code == 0, done.err
    assert service.metric("glider_embedding_requests_total", status="200") > before
    recorded = "".join(path.read_text() for path in (tmp_path / "run").iterdir() if path.is_file())
    assert service.url.rsplit(":", 1)[1] not in recorded + done.err
