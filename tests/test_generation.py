"""Generation and scoring through the routed model: every query of a mixed batch as if it were alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from routed_models import ALL_WAYS, ALPHAS, MODELS, NEVER

import glider_dist as gd
from glider_dist.evaluation.choices import cache_name, rank_choices
from glider_dist.evaluation.queries import Query, QueryRunner, Scope
from glider_dist.model.attach import context_of
from glider_dist.model.base import BaseModel, load_base
from glider_dist.model.batch import Collator, Encoded
from glider_dist.model.engine import FrozenBase
from glider_dist.parallel.ranks import ALONE
from glider_dist.tasks.prompt import answer
from glider_dist.tasks.task import Example, Task
from glider_dist.testing import (
    random_pool,
    save_tiny_base,
)

PROMPTS = ["Name the colour of the sky.\nOutput:", "2 + 2 =", "Translate: bonjour, tout le monde", "Q", "zebra!?"]
# The nearest expert, and with it alpha, differs between the queries.
SIMILARITY = torch.tensor(
    [
        [0.9, 0.1, 0.3, 0.2, 0.4],
        [0.2, 0.3, 0.25, 0.1, NEVER],
        [0.0, 0.1, 0.55, 0.8, 0.3],
        [0.1, 0.8, 0.2, 0.1, 0.7],
        [NEVER, NEVER, NEVER, NEVER, NEVER],
    ]
)
OWNERS = torch.tensor([4, 0, 2, 2, 1])
ROUTERS = {
    "glider": gd.RouterConfig(**ALPHAS),
    "topp": gd.RouterConfig(top_p=0.7, **ALPHAS),
    "shortlist": gd.RouterConfig(kind="global", shortlist=2, top_k=3, **ALPHAS),
    "arrow": gd.RouterConfig(kind="arrow"),
    "oracle": gd.RouterConfig(kind="oracle"),
}


@dataclass
class Attached:
    base: BaseModel
    runner: QueryRunner

    @property
    def model(self) -> Any:
        return self.base.model

    @property
    def collator(self) -> Collator:
        return self.runner.collator

    def scope(self, chosen: Sequence[int]) -> AbstractContextManager[Any]:
        """Scores, or under the oracle assignments, of some of the queries."""
        index = torch.tensor(list(chosen)) % len(PROMPTS)
        if context_of(self.model).strategy.static == "assigned":
            return gd.assign_experts(self.model, OWNERS[index])
        return gd.query_scores(self.model, SIMILARITY[index])


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Attached]:
    made: dict[str, Attached] = {}

    def find(name: str) -> Attached:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            base = load_base(str(save_tiny_base(folder / "base", MODELS[name]())), "float32", "cpu")
            pool = random_pool(folder / "pool", base.model, ranks=[1, 4, 8, 3, 5])
            gd.attach_pool(base.model, pool, ROUTERS["glider"])
            frozen = FrozenBase(base, ALONE, zero_stage=0)
            made[name] = Attached(base, QueryRunner(frozen, Collator(base, 256), 3))
        return made[name]

    return find


def generate(attached: Attached, chosen: Sequence[int], steps: int = 8, **settings: Any) -> Any:
    """What ``generate`` returns for these prompts in one batch, with the logits of every step."""
    encoded = [attached.collator.encode(PROMPTS[i]) for i in chosen]
    with torch.no_grad(), attached.scope(chosen):
        return attached.model.generate(
            **attached.collator.prompts(encoded),
            max_new_tokens=steps,
            **{"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **settings},
        )


def new_tokens(attached: Attached, sequence: torch.Tensor, steps: int) -> list[int]:
    """The generated ids up to the end token."""
    ids = sequence[1:].tolist() if attached.collator.seq2seq else sequence[-steps:].tolist()
    end = attached.base.tokenizer.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids


def compare(attached: Attached, together: Any, alone: Any, row: int) -> int:
    """Check the ids and every step's logits of one query; returns how many ids there are."""
    ids = new_tokens(attached, together.sequences[row], len(together.logits))
    assert ids == new_tokens(attached, alone.sequences[0], len(alone.logits))
    for step in range(min(len(ids), len(alone.logits))):
        theirs = alone.logits[step][0]
        limit = 1e-4 * float(theirs.abs().max())
        assert torch.allclose(together.logits[step][row], theirs, rtol=0, atol=limit)
    return len(ids)


@ALL_WAYS
@pytest.mark.parametrize(
    ("name", "router"),
    [*((name, router) for name in ("llama", "t5") for router in ROUTERS), ("qwen", "glider"), ("bert", "glider")],
)
def test_greedy_answers_of_a_padded_mixed_batch_equal_each_query_alone(name, router, way, loaded):
    attached = loaded(name)
    gd.set_router(attached.model, ROUTERS[router])
    everyone = range(len(PROMPTS))
    together = generate(attached, everyone)
    lengths = [compare(attached, together, generate(attached, [i]), i) for i in everyone]
    assert max(lengths) == 8
    if router != "arrow":  # arrow does not ask whose turn it is
        with attached.scope([(i + 1) % len(PROMPTS) for i in everyone]):
            others = attached.model(
                **attached.collator.batch([attached.collator.encode(text, "x") for text in PROMPTS]).inputs
            ).logits
        with attached.scope(everyone):
            own = attached.model(
                **attached.collator.batch([attached.collator.encode(text, "x") for text in PROMPTS]).inputs
            ).logits
        assert not torch.allclose(own, others, atol=1e-2)


@pytest.mark.parametrize("router", ["glider", "oracle"])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_changes_nothing(name, router, loaded):
    attached = loaded(name)
    gd.set_router(attached.model, ROUTERS[router])
    everyone = range(len(PROMPTS))
    cached, plain = generate(attached, everyone), generate(attached, everyone, use_cache=False)
    assert len(cached.logits) == len(plain.logits)
    for row in everyone:
        steps = len(new_tokens(attached, cached.sequences[row], len(cached.logits)))
        for ours, theirs in zip(cached.logits[:steps], plain.logits[:steps], strict=True):
            limit = 1e-4 * float(theirs.abs().max())
            assert torch.allclose(ours[row], theirs[row], rtol=0, atol=limit)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_under_a_static_cache_padding_is_neither_served_nor_counted(name, loaded):
    attached = loaded(name)
    gd.set_router(attached.model, ROUTERS["glider"])
    found = []
    for cache in ({}, {"cache_implementation": "static"}):
        gd.reset_routing_stats(attached.model)
        sequences = generate(attached, range(len(PROMPTS)), min_new_tokens=8, **cache).sequences
        found.append((sequences, gd.routing_stats(attached.model)))
    (sequences, counts), (others, other_counts) = found
    assert torch.equal(others, sequences)
    assert all(torch.equal(other_counts[site], value) for site, value in counts.items())


@pytest.mark.parametrize("router", ["glider", "oracle"])
@pytest.mark.parametrize("name", MODELS)
def test_beams_of_a_mixed_batch_equal_each_query_alone(name, router, loaded):
    attached = loaded(name)
    gd.set_router(attached.model, ROUTERS[router])
    settings = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "output_logits": False}
    together = generate(attached, range(len(PROMPTS)), steps=6, **settings)
    width = together.sequences.shape[1] - (1 if attached.collator.seq2seq else 0)
    for i in (0, 1, 4):
        alone = generate(attached, [i], steps=6, **settings)
        ours = together.sequences_scores[2 * i : 2 * i + 2]
        assert torch.allclose(ours, alone.sequences_scores, rtol=1e-4, atol=1e-5)
        for place in range(2):
            ids = new_tokens(attached, together.sequences[2 * i + place], min(6, width))
            theirs = new_tokens(attached, alone.sequences[place], 6)
            assert [t for t in ids if t] == [t for t in theirs if t]


@ALL_WAYS
@pytest.mark.parametrize("name", MODELS)
def test_generation_counts_real_tokens_and_cross_attention_counts_the_encoders(name, way, loaded):
    attached = loaded(name)
    gd.set_router(attached.model, ROUTERS["glider"])
    gd.reset_routing_stats(attached.model)
    chosen, steps = [0, 1, 2], 5
    generate(attached, chosen, steps, min_new_tokens=steps)
    prompts = sum(len(attached.collator.encode(PROMPTS[i]).prompt) for i in chosen)
    # The last token is generated, but never read.
    decoded = len(chosen) * (steps if attached.collator.seq2seq else steps - 1)
    for site, counts in gd.routing_stats(attached.model).items():
        cross = "EncDecAttention" in site or "crossattention" in site
        if not attached.collator.seq2seq:
            tokens = prompts + decoded
        elif site.startswith("encoder") or (cross and site.rsplit(".", 1)[-1] in ("k", "v", "key", "value")):
            tokens = prompts  # once: decoding steps take keys and values from the cache
        else:
            tokens = decoded
        assert int(counts.sum()) == 2 * tokens, site


@pytest.mark.parametrize("router", ["glider", "oracle"])
@pytest.mark.parametrize("name", MODELS)
def test_nll_of_a_batch_equals_the_models_own_loss_of_each_query(name, router, loaded):
    attached = loaded(name)
    gd.set_router(attached.model, ROUTERS[router])
    targets = [" blue as ever", " 4", " hi", " a much longer answer", ""]
    encoded = [attached.collator.encode(text, target) for text, target in zip(PROMPTS, targets, strict=True)]
    ours = attached.runner.nll(encoded, attached.scope)
    assert ours.dtype == torch.float32
    for i, item in enumerate(encoded):
        with torch.no_grad(), attached.scope([i]):
            if attached.collator.seq2seq:
                ids, labels = torch.tensor([item.prompt]), torch.tensor([item.answer])
                loss = attached.model(input_ids=ids, labels=labels).loss
            else:
                ids = torch.tensor([item.prompt + item.answer])
                labels = ids.clone()
                labels[:, : len(item.prompt)] = -100
                loss = attached.model(input_ids=ids, labels=labels).loss
        assert float(ours[i]) == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("router", ["glider", "oracle"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_each_query_alone_in_the_order_asked(name, router, loaded):
    attached = loaded(name)
    gd.set_router(attached.model, ROUTERS[router])
    everyone = range(len(PROMPTS))
    texts = attached.runner.answers([attached.collator.encode(text) for text in PROMPTS], 6, attached.scope)
    for i in everyone:
        alone = generate(attached, [i], steps=6)
        ids = new_tokens(attached, alone.sequences[0], len(alone.logits))
        assert texts[i] == attached.base.tokenizer.decode(ids, skip_special_tokens=True)


def test_generation_without_prompts_is_refused_and_none_is_no_prompt(loaded):
    attached = loaded("llama")
    for nothing in ({}, {"input_ids": None}):
        with pytest.raises(gd.GliderError, match="generate needs prompts: give one of input_ids, inputs_embeds"):
            gd.generate(attached.model, max_new_tokens=2, **nothing)
    ids = torch.tensor([[5, 6, 7]])
    embedded = attached.model.get_input_embeddings()(ids)
    with attached.scope([0]):
        made = gd.generate(attached.model, input_ids=None, inputs_embeds=embedded, max_new_tokens=2)
        assert gd.generate(attached.model, inputs=ids[:0], max_new_tokens=2).shape == (0, 3)
        assert gd.generate(attached.model, input_ids=ids, max_new_tokens=2)[0, 3:].tolist() == made[0].tolist()


def test_answers_of_the_same_length_go_on_after_the_end_token(loaded):
    attached = loaded("llama")
    gd.set_router(attached.model, ROUTERS["glider"])
    gd.reset_routing_stats(attached.model)
    encoded = [attached.collator.encode(text) for text in PROMPTS[:3]]
    attached.runner.answers(encoded, 7, attached.scope, same_length=True)
    counts = next(iter(gd.routing_stats(attached.model).values()))
    assert int(counts.sum()) == 2 * (sum(len(item.prompt) for item in encoded) + 3 * 6)


CHOICES: list[tuple[str, ...] | None] = [
    ("yes", "no"),
    None,
    ("a long choice of words", "b", "c", "dd"),
    ("only one",),
    ("x", "yy", "zzz"),
    ("no", "yes"),
    (),
    ("one", "two", "three", "four", "five"),
    ("same start", "same", "same end"),
    ("true", "false"),
]


def query(collator: Collator, i: int, choices: tuple[str, ...] | None) -> Query:
    text = PROMPTS[i % len(PROMPTS)]
    example = Example(str(i), text, "x", ("x",), choices)
    task = Task("t", "", "held_in", "exact_match", "", (), (), False, lambda part: [example])
    return Query(task, example, "", collator.encode(text, answer("x")), None)


def separate_score(attached: Attached, prompt: tuple[int, ...], choice: str, scope: Any) -> float:
    """Mean log-likelihood per token of one choice by one unpadded forward."""
    target = attached.collator.encode("", answer(choice)).answer
    with torch.no_grad(), scope:
        if attached.collator.seq2seq:
            start = torch.tensor([[attached.collator.start, *target[:-1]]])
            logits = attached.model(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits[0]
        else:
            logits = attached.model(input_ids=torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
    return -float(F.cross_entropy(logits, torch.tensor(target)))


@pytest.mark.parametrize(("router", "batch_size"), [("glider", 6), ("glider", 100), ("oracle", 1)])
@pytest.mark.parametrize("name", MODELS)
def test_rank_choices_agrees_with_scoring_every_pair_separately(name, router, batch_size, loaded):
    attached = loaded(name)
    gd.set_router(attached.model, ROUTERS[router])
    queries = [query(attached.collator, i, choices) for i, choices in enumerate(CHOICES)]
    scope: Scope = attached.scope
    ranked = rank_choices(attached.model, attached.collator, queries, batch_size, scope)
    for i, (one, choices) in enumerate(zip(queries, CHOICES, strict=True)):
        if not choices:
            assert ranked[i] is None
            continue
        scores = [separate_score(attached, one.encoded.prompt, text, scope([i])) for text in choices]
        assert ranked[i] == max(range(len(choices)), key=lambda j: scores[j]), (i, scores)


@pytest.mark.parametrize("name", MODELS)
def test_ranking_choices_uses_nothing_that_transformers_is_about_to_drop(name, loaded):
    attached = loaded(name)
    gd.set_router(attached.model, ROUTERS["glider"])
    queries = [query(attached.collator, 0, ("yes", "no"))]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        rank_choices(attached.model, attached.collator, queries, 4, attached.scope)


def test_ranking_choices_works_with_models_that_name_their_cache_otherwise(loaded, monkeypatch):
    attached = loaded("llama")
    gd.set_router(attached.model, ROUTERS["glider"])
    queries = [query(attached.collator, i, choices) for i, choices in enumerate(CHOICES)]
    wanted = rank_choices(attached.model, attached.collator, queries, 6, attached.scope)
    forward, name = attached.model.forward, cache_name(attached.model)

    def older(input_ids: torch.Tensor, past_key_values: Any = None, **others: Any) -> Any:
        result = forward(input_ids=input_ids, **{name: past_key_values}, **others)
        return SimpleNamespace(logits=result.logits, past_key_values=getattr(result, name))

    monkeypatch.setattr(attached.model, "forward", older)
    assert cache_name(attached.model) == "past_key_values"
    assert rank_choices(attached.model, attached.collator, queries, 6, attached.scope) == wanted


def test_a_causal_batch_keeps_its_logits_only_where_there_are_targets(loaded):
    attached = loaded("llama")
    batch = attached.collator.batch([Encoded((5, 6, 7), (8, 1)), Encoded((9,), (10, 11, 1))])
    assert batch.inputs["logits_to_keep"] == 4
    assert batch.targets.tolist() == [2, 3]
    assert batch.answers.tolist() == [8, 1, 10, 11, 1]
    assert (batch.rows.tolist(), batch.columns.tolist()) == ([0, 0, 1, 1, 1], [1, 2, 0, 1, 2])
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 1], [0, 9, 10, 11, 1]]
