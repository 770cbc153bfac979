"""What trains, in itself: what is kept of it in memory, and what finding its parts costs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_joint import Case, make_pool, originals_left
from transformers import AutoModelForCausalLM

from glider_dist.config import Config
from glider_dist.lora.bank import SiteBank
from glider_dist.model.attach import attach_pool, context_of
from glider_dist.planning.joint import staying_elements, written_elements
from glider_dist.planning.target import Target
from glider_dist.testing import LocalRanks, random_pool
from glider_dist.training.joint_params import Trained
from glider_dist.training.joint_settings import JointConfig
from glider_dist.training.joint_state import gather_state


@pytest.mark.jobs
def test_while_they_train_experts_and_gates_are_not_kept_as_they_were(
    local_ranks: Callable[[int], LocalRanks], tmp_path: Path
):
    path = make_pool(tmp_path / "pool")
    for case in (Case(2, 2), Case(3, 2, chosen=("expert_1", "expert_3")), Case(0, 1, train="gates")):
        for left in local_ranks(2).run(originals_left, case, path):
            assert left == set(), case


def live_bytes() -> int:
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = {each.untyped_storage() for each in tensors if not each.is_meta}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("chosen", [[], ["expert_1", "expert_3"]])
@pytest.mark.parametrize("what", ["both", "experts", "gates"])
def test_beside_what_trains_memory_has_what_the_plan_says(
    chosen: list[str], what: str, base: Path, tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(base)
    pool = random_pool(tmp_path / "pool", model, ranks=[8] * 5)
    before = live_bytes()
    attach_pool(model, pool)
    trained = Trained(context_of(model), range(5), chosen, what != "gates", what != "experts")
    experts, gates = trained.initial()
    values = {key: value.clone().requires_grad_() for key, value in {**experts, **gates}.items()}
    trained.bind(values)
    del experts, gates
    found = live_bytes() - before - sum(value.nbytes for value in values.values())
    cfg = Config(base=str(base), pool=str(pool.path), joint=JointConfig(train=what, experts=chosen))
    target = Target(cfg, 1)
    assert found == pytest.approx(4 * staying_elements(target), abs=3000)
    engine: Any = SimpleNamespace(full=lambda key, moment: values[key].detach())
    state = gather_state(engine, trained, moments=False)
    assert sum(value.numel() for part in state.values() for value in part.values()) == written_elements(target)


def seconds_to_gather(count: int) -> float:
    banks = {
        site: SiteBank(
            torch.zeros(count, 8, 1), torch.zeros(count, 8, 1), torch.ones(count), torch.ones(count) > 0
        )
        for site in ("q", "v")
    }
    gates = {site: torch.zeros(count, 1) for site in banks}
    names = tuple(f"expert_{index}" for index in range(count))
    trained = Trained(SimpleNamespace(names=names, banks=banks, gates=gates), range(count), [], True, True)  # type: ignore[arg-type]
    experts, gates = trained.initial()
    engine: Any = SimpleNamespace(full=lambda key, moment: {**experts, **gates}[key])
    started = time.process_time()
    state = gather_state(engine, trained)
    assert len(state) == count
    return time.process_time() - started


def test_what_saving_costs_grows_as_the_experts_do():
    # Sixteen times as many; a search through all of them for each was 120 times as slow.
    assert seconds_to_gather(1600) < 50 * min(seconds_to_gather(100) for _ in range(3))
