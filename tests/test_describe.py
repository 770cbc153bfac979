"""Descriptions by a chat model: from a real chat server (``transformers serve``), and what is made of answers."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from small_jobs import command, environment, free_port, kill, program, settings, write_tasks

from glider_dist.config import Config
from glider_dist.errors import EXIT_STOPPED, GliderError
from glider_dist.evaluation.queries import Query, warn_of_descriptions
from glider_dist.model.batch import Encoded
from glider_dist.pool import ExpertPool
from glider_dist.semantics.chat import ChatModel, NoAnswer, parse_descriptions, prompt_template
from glider_dist.semantics.chat_descriptions import QueryDescriber, sampled_examples
from glider_dist.semantics.global_router import query_settings
from glider_dist.semantics.settings import DescribeConfig
from glider_dist.tasks.jsonl import read_tasks
from glider_dist.tasks.task import Example, Task
from glider_dist.testing import random_pool, tiny_causal


@dataclass
class Endpoint:
    """A chat endpoint that answers as it is told, to see what happens when one fails or talks nonsense.

    What a real server does is tested against a real one; no model can be made to fail on demand.
    """

    replies: list[Any] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    delay: float = 0.0
    url: str = ""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.bodies.append(body)
            state.prompts.append(body["messages"][0]["content"])
            state.headers.append({key.lower(): value for key, value in self.headers.items()})
            state.times.append(time.monotonic())
            time.sleep(state.delay)
            reply = state.replies.pop(0) if len(state.replies) > 1 else state.replies[0]
            if isinstance(reply, bytes):
                content = reply
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
            elif isinstance(reply, int):
                content = b'{"error": {"message": "no"}}'
                self.send_response(reply)
                self.send_header("Retry-After", "0")
            else:
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
                usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
                answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
                content = json.dumps({**answer, "choices": [choice], "usage": usage}).encode()
                self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            with contextlib.suppress(BrokenPipeError):  # the client had waited long enough
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", state.url)
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-this-test")
    monkeypatch.setenv("OPENAI_MODEL", "some-model")
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """The words of a ``describe`` over a pool with experts for two tasks and one that no task describes."""
    write_tasks(tmp_path / "tasks")
    random_pool(tmp_path / "pool", tiny_causal(), ["copy", "upper", "stranger_thing"])
    changes = {"describe__source": "llm", "describe__cache": tmp_path / "answers.sqlite", "describe__workers": 1}
    return ["describe", *settings(tmp_path, **changes)]


def good(*sentences: str) -> str:
    return json.dumps({"descriptions": list(sentences)})


def cards(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return {expert.name: expert.card() for expert in ExpertPool.open(tmp_path / "pool").experts()}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (good("A task."), ["A task."]),
        (f"Sure!\n```json\n{good('Repeats   its', 'other')}\n```\nBye {{}}", ["Repeats its"]),
        ('{"a": 1} and {"descriptions": ["x y"]}', ["x y"]),
    ],
)
def test_an_answer_is_read_though_it_has_words_around_it(answer: str, expected: list[str]):
    assert parse_descriptions(answer, 1) == expected


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "no JSON"),
        ("{" * 10_000, "no JSON"),
        ("A task.", "no JSON"),
        ('{"descriptions": "x"}', "no list"),
        ('{"descriptions": [1, 2]}', "no list"),
        (good("same", "same"), "1 different"),
        (good("x", " . "), "empty"),
        (good("x", "y" * 700), "600 characters"),
    ],
)
def test_an_answer_of_another_form_is_refused_with_its_reason(answer: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        parse_descriptions(answer, 2)


def test_cards_say_who_described_and_the_key_is_nowhere(job: list[str], endpoint: Endpoint, tmp_path: Path):
    endpoint.replies = [good("It copies.", "It repeats."), good("It shouts.", "It capitalises.")]
    done = command(*job, "describe.descriptions=2")
    assert done.code == 0, done.err
    found = cards(tmp_path)
    assert found["copy"]["descriptions"] == ["It copies.", "It repeats."]
    assert found["copy"]["description_source"] == found["upper"]["description_source"] == "llm"
    assert found["copy"]["description_record"]["model"] == "some-model"
    assert found["stranger_thing"]["description_source"] == "name"
    assert "2 answers (0 not valid JSON), 0 from the cache, 22 prompt and 14 answer tokens" in done.err
    everything = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert "key-of-this-test" not in everything + done.err + done.out
    assert endpoint.url not in everything + done.err
    assert endpoint.headers[0]["authorization"] == "Bearer key-of-this-test"


def test_only_training_examples_are_shown(job: list[str], endpoint: Endpoint, tmp_path: Path):
    endpoint.replies = [good("x")]
    assert command(*job, "describe.examples=12").code == 0
    for prompt, name in zip(endpoint.prompts, ("copy", "upper"), strict=True):
        parts = {}
        for part in ("train", "validation", "test"):
            lines = (tmp_path / "tasks" / "tasks" / name / f"{part}.jsonl").read_text().splitlines()
            parts[part] = {json.loads(line)["input"] for line in lines}
        shown = {line[len("Input: ") :] for line in prompt.splitlines() if line.startswith("Input: ")}
        assert shown == parts["train"]
        assert not shown & ((parts["test"] | parts["validation"]) - parts["train"])


def test_three_examples_are_sampled_and_the_same_ones_every_time(tmp_path: Path):
    task = read_tasks(write_tasks(tmp_path / "tasks"), None)[0]
    three = sampled_examples(task, 3, seed=0)
    assert len(three) == 3
    assert sampled_examples(task, 3, seed=0) == three
    assert {tuple(e.id for e in sampled_examples(task, 3, seed)) for seed in range(5)} != {
        tuple(e.id for e in three)
    }


def test_a_second_run_asks_nothing_and_a_new_pool_is_answered_from_the_cache(
    job: list[str], endpoint: Endpoint, tmp_path: Path
):
    endpoint.replies = [good("x")]
    assert command(*job).code == 0
    asked = len(endpoint.prompts)
    assert asked == 2
    assert command(*job).code == 0
    random_pool(tmp_path / "other", tiny_causal(), ["copy", "upper"])
    done = command(*job, f"pool={tmp_path / 'other'}")
    assert done.code == 0
    assert "2 from the cache" in done.err
    assert len(endpoint.prompts) == asked
    assert command(*job, f"pool={tmp_path / 'other'}", "describe.model=another").code == 0


def test_a_run_that_was_stopped_keeps_what_it_had(job: list[str], endpoint: Endpoint, tmp_path: Path):
    endpoint.replies = [good("It copies."), 401]
    stopped = command(*job)
    assert stopped.code == 2
    assert "401" in stopped.errors[0]
    assert cards(tmp_path)["copy"]["descriptions"] == ["It copies."]
    endpoint.replies = [good("It shouts.")]
    before = len(endpoint.prompts)
    assert command(*job).code == 0
    assert len(endpoint.prompts) == before + 1
    assert cards(tmp_path)["upper"]["descriptions"] == ["It shouts."]


def test_a_job_that_is_to_stop_keeps_the_answers_it_has_and_ends_with_the_code_of_a_stop(
    job: list[str], endpoint: Endpoint, tmp_path: Path
):
    endpoint.replies = [good("It copies."), good("It shouts.")]
    stopped = command(*job, "max_minutes=1e-9")
    assert stopped.code == EXIT_STOPPED, stopped.err
    described = [name for name, card in cards(tmp_path).items() if card.get("descriptions")]
    assert len(described) == 1
    assert command(*job).code == 0
    assert [cards(tmp_path)[name]["description_source"] for name in ("copy", "upper")] == ["llm", "llm"]
    assert len(endpoint.prompts) <= 3  # one may have been asked for when the first was answered


def test_a_busy_or_broken_endpoint_is_asked_again(job: list[str], endpoint: Endpoint, tmp_path: Path):
    endpoint.replies = [503, 429, 500, good("x")]
    assert command(*job).code == 0
    assert cards(tmp_path)["copy"]["description_source"] == "llm"


def test_nonsense_is_asked_for_again_and_then_the_tasks_own_text_stays(
    job: list[str], endpoint: Endpoint, tmp_path: Path
):
    endpoint.replies = ["What a nice task!", good(), good("It copies."), "nonsense"]
    done = command(*job)
    assert done.code == 0, done.err
    assert cards(tmp_path)["copy"]["descriptions"] == ["It copies."]
    assert cards(tmp_path)["upper"]["description_source"] == "task descriptions"
    assert "1 experts keep the texts of their tasks" in done.err
    assert "(5 not valid JSON)" in done.err


@pytest.mark.parametrize("status", [400, 422])
def test_an_endpoint_that_takes_no_schema_is_asked_without_one_from_then_on(endpoint: Endpoint, status: int):
    endpoint.replies = [status, good("One."), good("Two.")]
    model = ChatModel(DescribeConfig(cache="off"))
    assert model.descriptions("$what", 1, {"what": "first"}) == ["One."]
    assert model.descriptions("$what", 1, {"what": "second"}) == ["Two."]
    model.close()
    first, *others = (body.get("response_format") for body in endpoint.bodies)
    items = first["json_schema"]["schema"]["properties"]["descriptions"]
    assert (items["minItems"], items["maxItems"]) == (1, 1)
    assert others == [None, None]


def test_a_refusal_for_another_reason_is_told(endpoint: Endpoint):
    endpoint.replies = [400]
    with pytest.raises(GliderError, match="refuses \\(status 400\\)"):
        ChatModel(DescribeConfig(cache="off")).descriptions("$what", 1, {"what": "first"})
    assert len(endpoint.prompts) == 2


def test_a_prompt_that_is_refused_costs_its_own_answer_alone(job: list[str], endpoint: Endpoint, tmp_path: Path):
    endpoint.replies = [400, 400, good("It shouts.")]
    done = command(*job)
    assert done.code == 0, done.err
    assert (
        "1 experts keep the texts of their tasks, such as copy: the chat endpoint refuses (status 400)" in done.err
    )
    assert cards(tmp_path)["copy"]["description_source"] == "task descriptions"
    assert cards(tmp_path)["upper"]["descriptions"] == ["It shouts."]
    # It was not the schema.
    assert ["response_format" in body for body in endpoint.bodies] == [True, False, True]


def test_a_web_page_in_the_place_of_an_answer_is_one_sentence(job: list[str], endpoint: Endpoint):
    endpoint.replies = [b"<html>hello</html>"]
    outcome = command(*job)
    assert outcome.code == 2
    assert "OPENAI_BASE_URL gives no chat completion, but '<html>hello</html>'" in outcome.errors[0]


def test_half_a_surrogate_pair_in_an_answer_is_a_question_mark():
    assert parse_descriptions('{"descriptions": ["So \\ud83d it goes."]}', 1) == ["So ? it goes."]


def test_a_name_makes_way_for_a_description_and_one_written_by_hand_stays(
    job: list[str], endpoint: Endpoint, tmp_path: Path
):
    pool = ExpertPool.open(tmp_path / "pool")
    pool.expert("copy").update_card(descriptions=["By hand."])
    pool.expert("upper").update_card(descriptions=["upper"], description_source="name")
    pool.expert("stranger_thing").update_card(descriptions=["It is told."], description_source="name")
    endpoint.replies = [good("By a model.")]
    assert command(*job).code == 0
    assert {name: card["descriptions"] for name, card in cards(tmp_path).items()} == {
        "copy": ["By hand."], "upper": ["By a model."], "stranger_thing": ["It is told."],
    }  # fmt: skip
    pool.expert("stranger_thing").update_card(descriptions=["stranger thing"])
    (tmp_path / "file.txt").write_text("stranger_thing: It is strange.\n")
    assert command(*job, f"describe_file={tmp_path / 'file.txt'}").code == 0
    assert cards(tmp_path)["stranger_thing"]["descriptions"] == ["It is strange."]


def test_requests_keep_to_the_rate(endpoint: Endpoint):
    endpoint.replies = [good("x")]
    chat = ChatModel(DescribeConfig(requests_per_minute=600, cache="off"))
    for place in range(6):
        chat.descriptions("$text", 1, {"text": str(place)})
    gaps = [b - a for a, b in zip(endpoint.times, endpoint.times[1:], strict=False)]
    assert min(gaps) > 0.05
    assert sum(gaps) >= 0.45


def test_a_query_is_described_once_and_stands_for_itself_after_the_time_out(endpoint: Endpoint):
    endpoint.replies = [good("Translation into French.")]
    describer = QueryDescriber(DescribeConfig(query_timeout=5, cache="off", workers=1))
    assert describer.describe(["Put it into French", "Put it into French"]) == ["Translation into French."] * 2
    assert len(endpoint.prompts) == 1
    assert "Put it into French" in endpoint.prompts[0]
    late = QueryDescriber(DescribeConfig(query_timeout=0.2, cache="off"))
    endpoint.delay = 1.0
    assert late.describe(["a", "b", "a"]) == ["a", "b", "a"]
    assert late.plain == 2


def test_scores_with_queries_described_by_another_model_are_other_scores(monkeypatch: pytest.MonkeyPatch):
    def of(**describe: Any) -> dict[str, Any]:
        return query_settings(SimpleNamespace(cfg=Config(describe=DescribeConfig(**describe))))  # type: ignore[arg-type]

    monkeypatch.setenv("OPENAI_MODEL", "some-model")
    default = of(queries="llm")
    assert default == of(queries="llm", model="some-model", examples=9)
    assert default != of(queries="llm", temperature=1.0)
    monkeypatch.setenv("OPENAI_MODEL", "another-model")
    assert default != of(queries="llm")
    assert of() == of(model="some-model") == {}


def test_no_model_or_no_endpoint_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    for name in ("OPENAI_MODEL", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(GliderError, match="OPENAI_MODEL"):
        ChatModel(DescribeConfig(cache="off"))
    with pytest.raises(GliderError, match="OPENAI_BASE_URL"):
        ChatModel(DescribeConfig(cache="off", model="m"))


def test_an_endpoint_that_is_not_there_is_no_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{free_port()}/v1")
    with pytest.raises(NoAnswer, match="run again"):
        ChatModel(DescribeConfig(cache="off", model="m", retries=0)).descriptions("x", 1, {})


def test_the_prompts_are_files_of_the_package():
    assert "$examples" in prompt_template("expert")
    assert "$text" in prompt_template("query")


@pytest.mark.model
@pytest.mark.slow
def test_a_real_chat_server_describes_experts(job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``transformers serve`` with SmolLM2-135M: the client is proven, not the descriptions."""
    from glider_dist.model.download import smollm2_folder

    folder, port = str(smollm2_folder()), free_port()
    words = [
        program("transformers"),
        "serve",
        folder,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(words, env=environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.5)
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
        monkeypatch.setenv("OPENAI_MODEL", folder)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        done = command(*job, "describe.max_tokens=60", "describe.tries=4", "describe.timeout=300")
        assert done.code == 0, done.err
        found = cards(tmp_path)
        print(done.err)
        print({name: (card["description_source"], card["descriptions"]) for name, card in found.items()})
        assert all(card["descriptions"] for card in found.values())
        assert "answer tokens" in done.err
        assert "0 prompt" not in done.err
    finally:
        kill(server)
        server.wait()


def test_queries_that_are_their_experts_descriptions_are_told(caplog: pytest.LogCaptureFixture):
    def query(instruction: str, owner: int | None) -> Query:
        example = Example("1", "x", "y", ("y",), None)
        task = Task("t", "Copy.", "held_in", "exact_match", "", (), (), False, lambda part: [example])
        return Query(task, example, instruction, Encoded((1,), (2,)), owner)

    descriptions = {"copy": ["Copy."], "upper": ["Shout.", "Use capitals."]}
    warn_of_descriptions([query("Please copy.", 0), query("Copy.", 1), query("Shout.", None)], descriptions)
    assert not caplog.records
    warn_of_descriptions([query("Please copy.", 0), query("Use capitals.", 1)], descriptions)
    assert "1 of 2 held-in queries are word for word a description of their own expert" in caplog.text
