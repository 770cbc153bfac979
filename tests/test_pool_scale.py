"""Pools of many adapters: opening, listing and verifying them takes time in proportion, and little of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_jobs import command

from glider_dist.pool import ExpertPool
from glider_dist.testing import random_pool, tiny_causal


def many(folder: Path, count: int) -> Path:
    """A pool of copies of one expert, written without syncing each file."""
    pool = random_pool(folder, tiny_causal(), experts=["expert_0"], rank=2, sites=[["q_proj"]])
    first = pool.expert("expert_0").folder
    for index in range(1, count):
        target = first.with_name(f"expert_{index}")
        shutil.copytree(first, target)
        card = json.loads((target / "card.json").read_text())
        (target / "card.json").write_text(
            json.dumps({**card, "name": target.name, "descriptions": ["It is a copy."]})
        )
    return pool.path


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(path: Path) -> tuple[float, float, float]:
    opened = seconds(lambda: len(ExpertPool.open(path)))
    listed = seconds(lambda: command("pool", "ls", str(path)))
    verified = seconds(lambda: command("pool", "verify", str(path)))
    print(f"  open {opened:.2f} s, ls {listed:.2f} s, verify {verified:.2f} s")
    return opened, listed, verified


def test_a_pool_of_500_is_opened_and_listed_at_once(tmp_path: Path) -> None:
    path = many(tmp_path / "pool", 500)
    assert len(command("pool", "ls", str(path)).out.splitlines()) == 502
    opened, listed, verified = measure(path)
    # Generous: other programs may use the cores.
    assert opened < 1
    assert listed < 3
    assert verified < 60


@pytest.mark.slow
def test_a_pool_of_10_000_is_opened_in_a_second_and_listed_in_three(tmp_path: Path) -> None:
    path = many(tmp_path / "pool", 10_000)
    command("pool", "ls", str(path))  # the first call imports modules
    opened, listed, _ = measure(path)
    assert opened < 1
    assert listed < 3
