"""Prototypes and average activations that are kept with the pool."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_free_cases import IDS, MODELS, logits_of

import glider_dist as gd
from glider_dist.model.activations import average_activations
from glider_dist.model.attach import context_of, install
from glider_dist.model.loading import load_banks
from glider_dist.model.stored import ACTIVATION_FILE, write_activations
from glider_dist.pool.adapter import WEIGHTS_FILE
from glider_dist.pool.files import write_tensors
from glider_dist.routing.local import arrow_prototypes
from glider_dist.testing import random_pool, tiny_causal


def cache_of(pool: gd.ExpertPool) -> list[Path]:
    return sorted((pool.router_dir / "prototypes" / "arrow").glob("*.safetensors"))


def test_prototypes_are_cached_by_the_adapters_hash_and_an_expert_replaced_gets_new_ones(tmp_path, monkeypatch):
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=3, gates=False)
    router = gd.RouterConfig(kind="arrow")
    first = logits_of(gd.attach_pool(tiny_causal(), pool, router))
    assert len(cache_of(pool)) == 3
    made: list[int] = []

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        made.append(a.shape[0])
        return arrow_prototypes(a, b)

    monkeypatch.setattr("glider_dist.model.stored.arrow_prototypes", counted)
    assert torch.equal(logits_of(gd.attach_pool(tiny_causal(), pool, router)), first)
    assert not made

    other = random_pool(tmp_path / "other", tiny_causal(), experts=1, gates=False, seed=9).expert("expert_0")
    weights = (other.folder / WEIGHTS_FILE).read_bytes()
    target = pool.expert("expert_1").folder / WEIGHTS_FILE
    target.write_bytes(weights)  # behind the pool's back: the card still has the old hash
    later = (pool.expert("expert_1").folder / "card.json").stat().st_mtime + 10
    os.utime(target, (later, later))
    changed = logits_of(gd.attach_pool(tiny_causal(), pool, router))
    assert set(made) == {1}
    assert len(cache_of(pool)) == 4
    fresh = tiny_causal()
    banks, _ = load_banks(fresh, pool, torch.float32, with_gates=False)
    install(fresh, pool.names, banks, {})
    gd.set_router(fresh, router)
    assert torch.equal(logits_of(fresh), changed)


def test_prototypes_are_exact_whoever_runs_the_first_forward_under_autocast(tmp_path):
    pool = random_pool(tmp_path, tiny_causal(), experts=3, gates=False)
    router = gd.RouterConfig(kind="arrow")
    with torch.autocast("cpu", torch.bfloat16):
        logits_of(gd.attach_pool(tiny_causal(), pool, router))
    kept = [load_file(path) for path in cache_of(pool)]
    for path in cache_of(pool):
        # What an earlier version kept.
        save_file({site: value.bfloat16() for site, value in load_file(path).items()}, path)
    logits_of(gd.attach_pool(tiny_causal(), pool, router))
    for path, first in zip(cache_of(pool), kept, strict=True):
        again = load_file(path)
        assert all(
            value.dtype == torch.float32 and torch.equal(value, first[site]) for site, value in again.items()
        )


def test_a_broken_cache_file_is_made_again_and_a_read_only_pool_serves(tmp_path, monkeypatch):
    pool = random_pool(tmp_path, tiny_causal(), experts=2, gates=False)
    router = gd.RouterConfig(kind="lag")
    first = logits_of(gd.attach_pool(tiny_causal(), pool, router))
    cache_of(pool)[0].write_bytes(b"broken")
    assert torch.equal(logits_of(gd.attach_pool(tiny_causal(), pool, router)), first)
    for path in cache_of(pool):
        path.unlink()

    def refuse(*_: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("glider_dist.model.stored.write_tensors", refuse)
    assert torch.equal(logits_of(gd.attach_pool(tiny_causal(), pool, router)), first)
    assert not cache_of(pool)


@pytest.mark.parametrize("name", MODELS)
def test_average_activation_routes_by_the_mean_input_of_the_real_tokens(name, tmp_path):
    model = MODELS[name]()
    pool = random_pool(tmp_path, model, experts=3, gates=False)
    gd.attach_pool(model, pool, gd.RouterConfig(kind="base"))
    seen: dict[str, list[torch.Tensor]] = {}
    site = next(iter(context_of(model).banks))
    module = model.get_submodule(site)
    for index, expert in enumerate(pool.experts()):
        rows = IDS + index
        padded = torch.cat([torch.zeros(2, 2, dtype=torch.int64), rows], 1)
        mask = torch.cat([torch.zeros(2, 2, dtype=torch.int64), torch.ones_like(rows)], 1)
        inputs = {"input_ids": padded, "attention_mask": mask}
        if name == "t5":
            inputs["decoder_input_ids"] = rows[:, :3]
        hook = module.register_forward_pre_hook(
            lambda _, args, name=expert.name: seen.setdefault(name, []).append(args[0][:, 2:].flatten(0, 1))
        )
        means = average_activations(model, [inputs, inputs], index)
        hook.remove()
        assert torch.allclose(means[site], torch.cat(seen[expert.name]).mean(0), atol=1e-5)
        write_activations(expert, means, "a test")
        assert ACTIVATION_FILE in expert.card()["files"]
    gd.detach(model)
    gd.attach_pool(model, pool, gd.RouterConfig(kind="average_activation", top_k=2))
    ours = logits_of(model)
    # The same as PHATGOOSE with the means for gates.
    banks = context_of(model).banks
    gates = {site: torch.stack([_stored(expert)[site] for expert in pool.experts()]) for site in banks}
    gd.detach(model)
    install(model, pool.names, banks, gates)
    gd.set_router(model, gd.RouterConfig(kind="phatgoose", top_k=2))
    assert torch.equal(ours, logits_of(model))


def _stored(expert: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(expert.folder / ACTIVATION_FILE)


def test_missing_or_foreign_activations_are_refused_and_the_model_stays_bare(tmp_path):
    model = tiny_causal()
    pool = random_pool(tmp_path, model, experts=2, gates=False)
    router = gd.RouterConfig(kind="average_activation")
    with pytest.raises(gd.GliderError, match=r"expert_0.*average-activations"):
        gd.attach_pool(model, pool, router)
    for expert in pool.experts():
        write_tensors(
            expert.folder / ACTIVATION_FILE, {"x": torch.zeros(2)}, {"adapter": "other", "made_from": "x"}
        )
    with pytest.raises(gd.GliderError, match="other weights"):
        gd.attach_pool(model, pool, router)
    gd.attach_pool(model, pool, gd.RouterConfig(kind="arrow"))


def test_what_is_attached_is_cached_as_itself_though_the_pool_has_changed_before_the_first_forward(tmp_path):
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=3, gates=False)
    router = gd.RouterConfig(kind="arrow")
    attached = gd.attach_pool(tiny_causal(), pool, router)
    other = random_pool(tmp_path / "other", tiny_causal(), experts=1, gates=False, seed=9).expert("expert_0")
    now = gd.ExpertPool.open(pool.path)
    now.remove("expert_1")
    now.add("expert_1", adapter=other.folder)
    logits_of(attached)
    changed = logits_of(gd.attach_pool(tiny_causal(), now, router))
    for path in cache_of(now):
        path.unlink()
    assert torch.equal(logits_of(gd.attach_pool(tiny_causal(), now, router)), changed)


def test_activations_of_a_pool_that_has_changed_are_refused_in_one_sentence(tmp_path):
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=3, gates=False)
    attached = gd.attach_pool(tiny_causal(), pool, gd.RouterConfig(kind="arrow"))
    gd.ExpertPool.open(pool.path).remove("expert_2")
    with pytest.raises(gd.GliderError, match="has changed since it was attached"):
        gd.set_router(attached, gd.RouterConfig(kind="average_activation"))
