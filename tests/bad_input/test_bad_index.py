"""An index or an embedder that does not fit is told in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import Refused, says
from small_jobs import HELD_IN, describe_and_index

from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import GATE_FILE
from glider_dist.semantics.index import FILE
from glider_dist.testing import random_pool, tiny_causal

INDEXED = ("calibrate", "evaluate", "predict")


@pytest.mark.parametrize("stage", INDEXED)
def test_a_missing_index_is_named(stage: str, refused: Refused, pool: ExpertPool) -> None:
    (pool.router_dir / FILE).unlink()
    says(refused(stage), pool.router_dir / FILE, "run index")


@pytest.mark.parametrize("stage", INDEXED)
def test_an_index_older_than_an_experts_description_is_refused(
    stage: str, refused: Refused, pool: ExpertPool
) -> None:
    pool.expert("upper").update_card(descriptions=["Something else now."])
    says(refused(stage), pool.router_dir / FILE, "changed", "run index again")


@pytest.mark.parametrize("stage", INDEXED)
def test_an_index_older_than_an_expert_is_refused(
    stage: str, refused: Refused, folder: Path, pool: ExpertPool
) -> None:
    expert = pool.expert("upper")
    pool.add("new", expert.folder, gate=expert.folder / GATE_FILE)
    says(refused(stage), pool.router_dir / FILE, "new", "run index again")


@pytest.mark.parametrize("stage", INDEXED)
def test_an_index_of_another_embedder_is_refused(stage: str, refused: Refused, pool: ExpertPool) -> None:
    describe_and_index(pool, embedder="some/other-embedder")
    says(refused(stage), "'some/other-embedder'", "'all-minilm-l6-v2'")


def test_an_index_of_another_dimension_than_the_embedders_is_refused(refused: Refused, pool: ExpertPool) -> None:
    describe_and_index(pool, width=8)
    says(refused("predict"), "384 dimensions", "index 8")


@pytest.mark.parametrize("stage", INDEXED)
def test_a_broken_index_is_named(stage: str, refused: Refused, pool: ExpertPool) -> None:
    path = pool.router_dir / FILE
    path.write_bytes(path.read_bytes()[:-10])
    says(refused(stage), path, "run index again")


def test_an_index_needs_descriptions(refused: Refused, folder: Path) -> None:
    random_pool(folder / "pool", tiny_causal(), experts=HELD_IN)
    says(refused("index"), "'copy' has no description", "describe")


def test_a_file_of_descriptions_with_a_line_that_is_none_is_refused(refused: Refused, folder: Path) -> None:
    random_pool(folder / "pool", tiny_causal(), experts=[*HELD_IN, "foreign"])
    (folder / "descriptions.txt").write_text("foreign: Does what no other expert does.\nno colon here\n")
    says(refused("describe", f"describe_file={folder}/descriptions.txt"), "descriptions.txt line 2")


def test_an_embedder_that_is_not_there_is_one_sentence(refused: Refused, folder: Path) -> None:
    pool = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN)
    for expert in pool.experts():
        expert.update_card(descriptions=["A description."])
    says(refused("index", f"embedder={folder}/gone"), f"{folder}/gone", "embedder=")
