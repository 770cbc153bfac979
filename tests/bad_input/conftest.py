"""A folder, a pool, and a command whose input is bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from refusals import Refused, one_sentence
from small_jobs import HELD_IN, command, describe_and_index, settings, snapshot, write_tasks

from glider_dist.pool import ExpertPool
from glider_dist.testing import random_pool, tiny_causal


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder of tasks: what a command writes by default lands in it, too."""
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path / "tasks")
    return tmp_path


@pytest.fixture
def pool(folder: Path) -> ExpertPool:
    """Three experts with gates, descriptions and an index."""
    made = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN)
    describe_and_index(made)
    return made


@pytest.fixture
def refused(folder: Path, base: Path) -> Refused:
    """Run a command and return its one sentence, having checked that it wrote nothing and left code 2."""

    def run(name: str, *words: str, text: str | None = None, **changes: Any) -> str:
        before = snapshot(folder)
        if name == "predict" and text is None:
            text = "Repeat the words. Input: sun river"
        texts = [] if text is None else [text]
        outcome = command(name, *texts, *settings(folder, **{"base": base, **changes}), *words)
        assert snapshot(folder) == before
        return one_sentence(outcome)

    return run
