"""Rank classification: which of the given choices is the likeliest answer.

The prompt runs once for all its choices: its key-value cache (causal models) or its encoder states
(encoder-decoders) are repeated for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from glider_dist.errors import GliderError
from glider_dist.evaluation.queries import Query, Scope
from glider_dist.model.batch import Collator, Encoded
from glider_dist.tasks.prompt import answer

Inputs = dict[str, torch.Tensor]


def check_choices(collator: Collator, queries: Sequence[Query]) -> None:
    """Raises GliderError for a choice that is too long, before hours of other work are done."""
    for query in queries:
        for choice in query.example.choices or ():
            try:
                collator.encode("", answer(choice))
            except GliderError as error:
                raise GliderError(
                    f"task {query.task.name!r}, choices of example {query.example.id!r}: {error}"
                ) from None


@torch.no_grad()
def rank_choices(
    model: Any,
    collator: Collator,
    queries: Sequence[Query],
    batch_size: int,
    scope: Scope,
    known: Mapping[int, int] = MappingProxyType({}),
    on_batch: Callable[[dict[int, int]], Any] = lambda found: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[int | None]:
    """Position of the likeliest choice of each query by mean log-likelihood per token (PHATGOOSE,
    ``interface_mixin.py:93-145``); None for a query without choices, and where ``stop`` came first.

    Args:
        batch_size: (query, choice) rows per forward at most; a query's choices stay together.
        known: positions that are there already, by query.
        on_batch: called with those of each batch.
        stop: asked between batches; the first is run in any case.
    """
    best = [known.get(i) for i in range(len(queries))]
    order = sorted(
        (i for i, query in enumerate(queries) if query.example.choices and i not in known),
        key=lambda i: len(queries[i].encoded.prompt),
    )
    start = 0
    while start < len(order) and not (start and stop()):
        chosen: list[int] = []
        rows = 0
        # All queries of a batch get as many rows as the one with the most choices.
        for i in order[start:]:
            width = max(len(queries[j].example.choices or ()) for j in [*chosen, i])
            if chosen and width * (len(chosen) + 1) > batch_size:
                break
            chosen.append(i)
            rows = width
        start += len(chosen)
        with scope(chosen):
            scores = _choice_scores(model, collator, [queries[i] for i in chosen], rows)
        found = dict(zip(chosen, scores.argmax(1).tolist(), strict=True))
        for i, place in found.items():
            best[i] = place
        on_batch(found)
    return best


def _choice_scores(model: Any, collator: Collator, queries: Sequence[Query], width: int) -> torch.Tensor:
    """Mean log-likelihood per token of each choice; ``[B, width]``, -inf where there is no choice."""
    texts = [list(query.example.choices or ()) for query in queries]
    answers = [
        collator.encode("", answer(text)).answer for row in texts for text in row + row[:1] * (width - len(row))
    ]
    empty = torch.tensor([[place >= len(row) for place in range(width)] for row in texts])
    prompts = collator.prompts([Encoded(query.encoded.prompt, ()) for query in queries])
    ids, mask = collator.pad_rows(answers, left=False)
    if collator.seq2seq:
        starts = collator.pad_rows([(collator.start, *row[:-1]) for row in answers], left=False)
        logits = _seq2seq(model, prompts, *starts, width)
    else:
        logits = _causal(model, collator, prompts, ids, mask, width)
    at = mask.bool()
    losses = F.cross_entropy(logits[at].float(), ids[at], reduction="none")
    total = torch.zeros(at.shape, device=losses.device).masked_scatter(at, losses).sum(1)
    scores = -(total / at.sum(1)).view(len(queries), width).cpu()
    return scores.masked_fill(empty, float("-inf"))


def _causal(
    model: Any, collator: Collator, prompts: Inputs, ids: torch.Tensor, mask: torch.Tensor, width: int
) -> torch.Tensor:
    """Logits of each answer's tokens; ``[B * width, L, V]``."""
    keep = {"logits_to_keep": 1} if collator.keeps_logits else {}
    prompt_mask = prompts["attention_mask"]
    first = model(**prompts, **collator.positions(prompt_mask), **keep, use_cache=True)
    key = cache_name(model)
    cache = getattr(first, key)
    cache.batch_repeat_interleave(width)
    full = torch.cat([prompt_mask.repeat_interleave(width, 0), mask], 1)
    positions = {name: value[:, prompt_mask.shape[1] :] for name, value in collator.positions(full).items()}
    rest = model(input_ids=ids, attention_mask=full, **{key: cache}, **positions, use_cache=True)
    before = first.logits[:, -1:].repeat_interleave(width, 0)
    return torch.cat([before, rest.logits[:, :-1]], 1)


def cache_name(model: Any) -> str:
    """What the model's forward and its output call the cache: transformers renames it, model by model."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _seq2seq(model: Any, prompts: Inputs, ids: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
    """Logits of each answer's tokens, given these shifted by one; ``[B * width, L, V]``."""
    states = model.get_encoder()(**prompts)
    states.last_hidden_state = states.last_hidden_state.repeat_interleave(width, 0)
    return model(
        encoder_outputs=states,
        attention_mask=prompts["attention_mask"].repeat_interleave(width, 0),
        decoder_input_ids=ids,
        decoder_attention_mask=mask,
    ).logits
