"""A chat model behind any OpenAI-compatible endpoint, asked for JSON.

The address and the key come from the environment, as the ``openai`` package reads them: ``OPENAI_BASE_URL`` and
``OPENAI_API_KEY``; the model from ``describe.model`` or ``OPENAI_MODEL``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from glider_dist.errors import GliderError
from glider_dist.model.cache import cache_dir
from glider_dist.semantics.cache_file import CacheFile
from glider_dist.semantics.service.access import keep_addresses_out_of_logs
from glider_dist.semantics.settings import DescribeConfig

log = logging.getLogger(__name__)

_CACHED = 1_000_000  # answers
_LATER_TEMPERATURE = 0.7  # the same prompt at temperature 0 would get the same answer
_LONGEST = 600  # characters of a description


class NoAnswer(GliderError):
    """The endpoint failed or gave no valid JSON, however often it was asked."""


@dataclass
class Usage:
    """What the endpoint was asked, and what it counted."""

    requests: int = 0
    cached: int = 0
    invalid: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __str__(self) -> str:
        return (
            f"{self.requests} answers ({self.invalid} not valid JSON), {self.cached} from the cache, "
            f"{self.prompt_tokens} prompt and {self.completion_tokens} answer tokens"
        )


def model_of(settings: DescribeConfig) -> str | None:
    """The name of the chat model, if one is given."""
    return settings.model or os.environ.get("OPENAI_MODEL")


def prompt_template(name: str) -> str:
    """A prompt of the package: ``expert`` or ``query``."""
    return resources.files("glider_dist.semantics").joinpath(f"prompts/{name}.txt").read_text(encoding="utf-8")


class ChatModel:
    """Asks for descriptions; safe to use from several threads.

    Args:
        timeout: seconds for one answer; None takes ``settings.timeout``.
        retries: repeated requests; None takes ``settings.retries``.

    Raises:
        GliderError: the package ``openai``, a model or a key is missing.
    """

    def __init__(self, settings: DescribeConfig, timeout: float | None = None, retries: int | None = None):
        try:
            import openai
        except ImportError:
            raise GliderError("a chat model needs the openai package: pip install 'glider_dist[serve]'") from None
        model = model_of(settings)
        if not model:
            raise GliderError("no chat model is named; set describe.model or OPENAI_MODEL")
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not os.environ.get("OPENAI_BASE_URL"):
            raise GliderError("no chat endpoint is named; set OPENAI_BASE_URL or OPENAI_API_KEY")
        keep_addresses_out_of_logs()
        self.model = model
        self.settings = settings
        self.usage = Usage()
        self._client = openai.OpenAI(
            api_key=key or "none",
            timeout=timeout or settings.timeout,
            max_retries=settings.retries if retries is None else retries,
        )
        self._failures = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)
        self._refusals = openai.APIStatusError
        self._not_understood = (openai.BadRequestError, openai.UnprocessableEntityError)
        self._takes_schema = True
        self._lock = threading.Lock()
        self._next = 0.0
        self._file = None
        if settings.cache != "off":
            path = Path(settings.cache) if settings.cache else cache_dir() / "descriptions.sqlite"
            self._file = CacheFile(path, _CACHED)

    def descriptions(self, template: str, number: int, values: dict[str, str]) -> list[str]:
        """``number`` descriptions; the prompt is the template with ``values`` for its ``$names``.

        Raises:
            NoAnswer: the endpoint failed, or no answer was valid.
            GliderError: the endpoint refuses, because of the key or the model, say.
        """
        prompt = Template(template).substitute(values)
        identity = [self.model, prompt, number, self.settings.max_tokens, self.settings.temperature]
        key = hashlib.sha256(json.dumps(identity).encode()).digest()
        if self._file is not None and (entry := self._file.get([key]).get(key)) is not None:
            with self._lock:
                self.usage.cached += 1
            return list(json.loads(entry))
        reason = ""
        for turn in range(self.settings.tries):
            text = self._ask(prompt, number, turn)
            try:
                found = parse_descriptions(text, number)
            except ValueError as error:
                reason = str(error)
                with self._lock:
                    self.usage.invalid += 1
                continue
            if self._file is not None:
                self._file.put({key: json.dumps(found, ensure_ascii=False).encode()})
            return found
        raise NoAnswer(f"chat model {self.model!r} gave no valid answer in {self.settings.tries} tries ({reason})")

    def _ask(self, prompt: str, number: int, turn: int) -> str:
        temperature = self.settings.temperature
        if turn:
            temperature = max(temperature, _LATER_TEMPERATURE)
        try:
            answer = self._create(prompt, number, temperature)
        except self._failures as error:
            raise NoAnswer(
                f"the chat endpoint failed ({type(error).__name__}); run again, what is done is kept"
            ) from None
        except self._refusals as error:
            message = str(getattr(error, "body", None) or error)[:200]
            # One prompt may be too long for the model or stopped by a filter; a wrong key or model meets them all.
            kind = NoAnswer if isinstance(error, self._not_understood) else GliderError
            raise kind(f"the chat endpoint refuses (status {error.status_code}): {message}") from None
        if not hasattr(answer, "choices"):
            raise GliderError(
                f"the endpoint of OPENAI_BASE_URL gives no chat completion, but {str(answer)[:60]!r}"
            )
        with self._lock:
            self.usage.requests += 1
            if answer.usage is not None:
                self.usage.prompt_tokens += answer.usage.prompt_tokens
                self.usage.completion_tokens += answer.usage.completion_tokens
        return (answer.choices[0].message.content or "") if answer.choices else ""

    def _create(self, prompt: str, number: int, temperature: float) -> Any:
        if not self._takes_schema:
            return self._complete(prompt, temperature)
        try:
            return self._complete(prompt, temperature, response_format=_form_of(number))
        except self._not_understood as error:
            answer = self._complete(prompt, temperature)
            # It was the schema, else this one would have been refused as well.
            self._takes_schema = False
            log.debug("the chat endpoint takes no JSON schema (status %d): asked without", error.status_code)
            return answer

    def _complete(self, prompt: str, temperature: float, **more: Any) -> Any:
        self._pace()
        return self._client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=self.settings.max_tokens,
            temperature=temperature,
            **more,
        )

    def _pace(self) -> None:
        if self.settings.requests_per_minute <= 0:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + 60.0 / self.settings.requests_per_minute
        time.sleep(start - now)

    def close(self) -> None:
        self._client.close()
        if self._file is not None:
            self._file.close()


def _form_of(number: int) -> dict[str, Any]:
    """The answer's JSON schema, for servers that let a model write nothing else (OpenAI, vLLM, llama.cpp, ...)."""
    sentences = {"type": "array", "items": {"type": "string"}, "minItems": number, "maxItems": number}
    schema = {
        "type": "object",
        "properties": {"descriptions": sentences},
        "required": ["descriptions"],
        "additionalProperties": False,
    }
    return {
        "type": "json_schema",
        "json_schema": {"name": "descriptions", "strict": True, "schema": schema},
    }


def parse_descriptions(text: str, number: int) -> list[str]:
    """The descriptions in a model's answer: the first JSON object in it that has the right form.

    Raises:
        ValueError: there is none, saying why.
    """
    decoder = json.JSONDecoder()
    reason = "no JSON object"
    for match in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        found = value.get("descriptions")
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            reason = "no list of descriptions"
            continue
        # Half a surrogate pair, which JSON can hold, has no UTF-8 form.
        whole = (item.encode(errors="replace").decode() for item in found)
        kept = list(dict.fromkeys(" ".join(item.split()) for item in whole))
        if len(kept) < number:
            reason = f"{len(kept)} different descriptions instead of {number}"
        elif not all(item.strip(" .") for item in kept[:number]):
            reason = "an empty description"
        elif max(map(len, kept[:number])) > _LONGEST:
            reason = f"a description of more than {_LONGEST} characters"
        else:
            return kept[:number]
    raise ValueError(reason)
