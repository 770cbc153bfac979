"""Test and validation queries, and the two things done with them: likelihood of the target, greedy answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from glider_dist.model.batch import Collator, Encoded, target_nll
from glider_dist.model.engine import FORWARD, GENERATE, STOP, FrozenBase
from glider_dist.model.example import encode_example
from glider_dist.parallel.stopping import StopWish
from glider_dist.tasks.task import Example, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Query:
    """One example as the model sees it.

    Attributes:
        instruction: the part of the prompt that is embedded for the global router.
        encoded: token ids of the prompt and of the target.
        owner: position of a held-in task's own expert in the pool, or None if the pool has none.
    """

    task: Task
    example: Example
    instruction: str
    encoded: Encoded
    owner: int | None


def make_queries(
    tasks: Sequence[Task], part: str, limit: int, collator: Collator, names: Sequence[str]
) -> list[Query]:
    """The first ``limit`` examples of each task; raises GliderError for a missing part or a target too long."""
    position = {name: index for index, name in enumerate(names)}
    queries = []
    for task in tasks:
        for example in task.examples(part)[:limit]:
            instruction, encoded = encode_example(collator, task, part, example)
            owner = position.get(task.name) if task.split == "held_in" else None
            queries.append(Query(task, example, instruction, encoded, owner))
    return queries


def warn_of_descriptions(queries: Sequence[Query], descriptions: Mapping[str, Sequence[str]]) -> None:
    """Say so where queries are the very sentences that describe their experts: of tasks with a definition alone.

    Args:
        descriptions: ``{expert: sentences}`` in the pool's order.
    """
    of_expert = list(descriptions.values())
    owned = [(query.instruction, query.owner) for query in queries if query.owner is not None]
    same = [text for text, owner in owned if text in of_expert[owner]]
    if same:
        log.warning(
            "%d of %d held-in queries are word for word a description of their own expert (%r, say): global "
            "scores then tell that a sentence is known, not what it means; give the tasks query_instructions",
            len(same), len(owned), same[0][:60],
        )  # fmt: skip


def queries_digest(tasks: Sequence[Task], part: str, limit: int) -> str:
    """Hash of everything :func:`make_queries` reads: examples and wordings, not just the tasks' names."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(json.dumps([task.name, task.split, task.metric]).encode())
        for example in task.examples(part)[:limit]:
            parts = [example.id, example.input, example.targets, example.choices, task.instruction(example, part)]
            digest.update(json.dumps(parts).encode())
    return digest.hexdigest()


Scope = Callable[[Sequence[int]], AbstractContextManager[Any]]
"""Given the positions of a batch's queries, the context that gives them their scores or experts."""


def no_scope(_: Sequence[int]) -> AbstractContextManager[Any]:
    return contextlib.nullcontext()


class QueryRunner:
    """Runs this rank's share of the queries over the base, in step with the other ranks if it is sharded.

    Args:
        stop: where it wishes, the loop over the batches breaks off after a batch.

    Attributes:
        broke_off: whether a loop did, so that what it returned is not whole.
    """

    def __init__(self, frozen: FrozenBase, collator: Collator, batch_size: int, stop: StopWish | None = None):
        self.frozen = frozen
        self.collator = collator
        self.batch_size = batch_size
        self.broke_off = False
        self._stop = stop
        self._ran = False

    def _goes_on(self, kind: int) -> bool:
        """Agree with the other ranks on the next batch. The first one is run whatever is wished, so that every
        start does something."""
        wish = self._ran and self._stop is not None and self._stop.wished
        self.broke_off = self.frozen.turn(STOP if wish else kind) == STOP
        self._ran = True
        return not self.broke_off

    def batches(self, encoded: Sequence[Encoded]) -> Iterator[list[int]]:
        """Positions of the queries of each batch, in the order in which they run."""
        order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i].prompt), i))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    @torch.no_grad()
    def nll(self, encoded: Sequence[Encoded], scope: Scope = no_scope) -> torch.Tensor:
        """Nats per target token of each query; ``[len(encoded)]`` fp32 on the CPU."""
        result = torch.zeros(len(encoded))
        for chosen in self.batches(encoded):
            if not self._goes_on(FORWARD):
                return result
            batch = self.collator.batch([encoded[i] for i in chosen])
            with scope(chosen):
                result[chosen] = (target_nll(self.frozen.model, batch) / batch.targets).cpu()
        self.finish(scope)
        return result

    @torch.no_grad()
    def answers(
        self,
        encoded: Sequence[Encoded],
        max_new_tokens: int,
        scope: Scope = no_scope,
        same_length: bool = False,
        known: Mapping[int, str] = MappingProxyType({}),
        on_batch: Callable[[dict[int, str]], Any] = lambda texts: None,
    ) -> list[str]:
        """Greedy answers, special tokens removed; ``same_length`` goes on after the end token (for timing).

        Args:
            known: answers that are there already, by position; a batch that needs no others is not run.
            on_batch: called with the answers of each batch, by position.
        """
        texts = [known.get(i, "") for i in range(len(encoded))]
        for chosen in self.batches(encoded):
            if all(i in known for i in chosen):
                continue
            if not self._goes_on(GENERATE):
                return texts
            with scope(chosen):
                generated = self._generate([encoded[i] for i in chosen], max_new_tokens, same_length)
            for index, text in zip(chosen, generated, strict=True):
                texts[index] = text
            on_batch(dict(zip(chosen, generated, strict=True)))
        self.finish(scope, max_new_tokens)
        return texts

    def _generate(self, encoded: Sequence[Encoded], max_new_tokens: int, same_length: bool = False) -> list[str]:
        inputs = self.collator.prompts(encoded)
        tokenizer = self.collator.tokenizer
        ids = self.frozen.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens if same_length else None,
            pad_token_id=self.collator.pad,
            eos_token_id=tokenizer.eos_token_id,
            synced_gpus=self.frozen.lockstep,
        )
        new = ids if self.collator.seq2seq else ids[:, inputs["input_ids"].shape[1] :]
        return list(tokenizer.batch_decode(new, skip_special_tokens=True))

    def finish(self, scope: Scope, max_new_tokens: int = 1) -> None:
        """Take part in the other ranks' collectives until they are done, too."""

        def dummy(kind: int) -> None:
            assert kind in (FORWARD, GENERATE)
            with scope([0]):
                if kind == GENERATE:
                    self._generate([Encoded((self.collator.pad,), ())], max_new_tokens)
                else:
                    target_nll(self.frozen.model, self.collator.dummy())

        self.frozen.drain(dummy)
