"""Descriptions by a chat model: of experts from training examples of their tasks, and of queries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from glider_dist.semantics.chat import ChatModel, NoAnswer, prompt_template
from glider_dist.semantics.settings import DescribeConfig

if TYPE_CHECKING:
    from glider_dist.tasks.task import Example, Task

log = logging.getLogger(__name__)

_CUT = 1500  # characters of an example's input


def sampled_examples(task: Task, count: int, seed: int) -> list[Example]:
    """``count`` training examples, chosen by the seed and the examples' ids; never of another part."""
    from glider_dist.tasks.task import stable_hash

    examples = task.examples("train")
    return sorted(examples, key=lambda example: stable_hash(f"{seed} {task.name} {example.id}"))[:count]


def describe_experts(
    tasks: Sequence[Task],
    chat: ChatModel,
    settings: DescribeConfig,
    seed: int,
    done: Callable[[Task, list[str], dict[str, Any]], None],
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """Ask for the descriptions of each task's expert; ``done(task, descriptions, record)`` as each arrives.

    Args:
        stop: asked after each; if so, what is asked for is waited for no more than the answers under way.

    Returns:
        ``{task: reason}`` for those that got none.

    Raises:
        GliderError: the endpoint refuses; what was done before is kept.
    """
    template = prompt_template("expert")
    failed = {}

    def ask(task: Task) -> tuple[list[str], dict[str, Any]]:
        examples = sampled_examples(task, settings.examples, seed)
        pairs = [(example.input[:_CUT].strip(), example.target[:_CUT].strip()) for example in examples]
        shown = "\n\n".join(f"Input: {given}\nAnswer: {right}" for given, right in pairs)
        number = settings.descriptions
        values = {"examples": shown, "count": str(len(examples)), "number": str(number)}
        found = chat.descriptions(template, number, values)
        return found, {"model": chat.model, "examples": [example.id for example in examples]}

    with ThreadPoolExecutor(settings.workers, "describe") as threads:
        asked = {threads.submit(ask, task): task for task in tasks}
        try:
            for answer in as_completed(asked):
                try:
                    found, record = answer.result()
                except NoAnswer as error:
                    failed[asked[answer].name] = str(error)
                else:
                    done(asked[answer], found, record)
                if stop():
                    threads.shutdown(cancel_futures=True)
                    break
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return failed


class QueryDescriber:
    """Descriptions of queries, each asked for once; a query without an answer in time stands for itself."""

    def __init__(self, settings: DescribeConfig):
        self.settings = settings
        self.plain = 0
        self._chat = ChatModel(settings, timeout=settings.query_timeout, retries=0)
        self._template = prompt_template("query")
        self._known: dict[str, str] = {}

    def describe(self, queries: Sequence[str]) -> list[str]:
        """One text per query; ``plain`` counts those that are the query itself.

        Raises:
            GliderError: the endpoint refuses.
        """
        new = [query for query in dict.fromkeys(queries) if query not in self._known]
        if new:
            with ThreadPoolExecutor(min(self.settings.workers, len(new)), "describe") as threads:
                self._known.update(zip(new, threads.map(self._ask, new), strict=True))
        return [self._known[query] for query in queries]

    def _ask(self, query: str) -> str:
        try:
            return self._chat.descriptions(self._template, 1, {"text": query})[0]
        except NoAnswer as error:
            if self.plain == 0:
                log.warning("%s; such queries are embedded as they are", error)
            self.plain += 1
            return query
