"""``pool import`` of the checkpoints that the authors of GLIDER and PHATGOOSE publish."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference_data import reference
from safetensors.torch import load_file
from small_jobs import command
from transformers import AutoModelForSeq2SeqLM

import glider_dist as gd
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import GATE_FILE, WEIGHTS_FILE


def published(layout: str, folder: Path, alpha: float) -> dict[str, torch.Tensor]:
    """The experts of a fixture as the authors would have saved them: scale 1/r, so B carries the rest."""
    state: dict[str, torch.Tensor] = {"encoder.embed_tokens.weight": torch.zeros(4, 4)}
    gates: dict[str, list[torch.Tensor]] = {}
    for index, expert in enumerate(sorted((folder / "experts").iterdir())):
        for key, tensor in load_file(expert / WEIGHTS_FILE).items():
            site, which = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
            value = tensor * alpha if which == "B" else tensor
            if layout == "glider":
                state[f"base_model.model.{site}.lora_experts.default.{index}.lora_{which}.weight"] = value
            else:
                layer = {"A": 1, "B": 2}[which]
                state[f"{site}._addons.expert_lora.layer{layer}__{index}"] = value.t().contiguous()
        for site, vector in load_file(expert / GATE_FILE).items():
            gates.setdefault(site, []).append(vector)
            if layout == "phatgoose":
                state[f"{site}._addons.router.expert_embeddings__{index}"] = vector
    if layout == "glider":
        state.update(
            {f"base_model.model.{site}.lora_gate.default.weight": torch.stack(v) for site, v in gates.items()}
        )
    return state


@pytest.mark.parametrize("layout", ["glider", "phatgoose"])
def test_a_published_checkpoint_gives_the_outputs_of_the_authors_layer(layout: str, tmp_path: Path) -> None:
    folder = reference("fixtures") / "t5_tiny"
    meta = json.loads((folder / "meta.json").read_text())
    torch.save(published(layout, folder, float(meta["lora_alpha"])), tmp_path / "pool.pt")
    words = ["pool", "import", str(tmp_path / "P"), f"task={tmp_path / 'pool.pt'}", f"base={folder / 'base'}"]
    outcome = command(*words)
    assert outcome.code == 0, outcome.err + outcome.out
    assert "already there" in command(*words).out
    pool = ExpertPool.open(tmp_path / "P")
    assert pool.names == tuple(f"task_{i}" for i in range(meta["num_experts"]))
    assert pool.missing_gates() == []
    assert command("pool", "verify", str(pool.path)).code == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    inputs = load_file(folder / "inputs.safetensors")
    wanted = load_file(folder / "expected.safetensors")["glider_alpha3_top2.logits"]
    router = gd.RouterConfig(kind="glider", top_k=2, alpha_in=3.0, alpha_out=3.0, threshold=0.5)
    gd.attach_pool(model, pool, router)
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    with torch.no_grad(), gd.query_scores(model, inputs["global_similarity"]):
        found = model(**{name: inputs[name] for name in names}).logits
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-4


def test_a_folder_of_converted_checkpoints_has_one_expert_per_file(tmp_path: Path) -> None:
    folder = reference("fixtures") / "t5_tiny"
    for index in range(2):
        expert = folder / "experts" / f"expert_{index}"
        state = {
            key.replace(".weight", ".default.weight"): value
            for key, value in load_file(expert / WEIGHTS_FILE).items()
        }
        gate = load_file(expert / GATE_FILE)
        state.update({f"base_model.model.{site}.lora_gate.default": vector for site, vector in gate.items()})
        (tmp_path / "runs").mkdir(exist_ok=True)
        torch.save(state, tmp_path / "runs" / f"task{index}_best.pt")
    words = ["pool", "import", str(tmp_path / "P"), str(tmp_path / "runs")]
    assert "add base=" in command(*words).errors[0]
    assert command(*words, f"base={folder / 'base'}").code == 0
    pool = ExpertPool.open(tmp_path / "P")
    assert pool.names == ("task0", "task1")
    assert pool.expert("task0").config()["lora_alpha"] == 1
    assert pool.missing_gates() == []
