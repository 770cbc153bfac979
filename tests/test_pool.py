"""The pool on disk: what is read when, what a write leaves behind, and adapters that PEFT saved."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_jobs import environment, snapshot
from transformers import GPT2Config, GPT2LMHeadModel

from glider_dist.config import RouterConfig
from glider_dist.errors import GliderError
from glider_dist.model.attach import assign_experts, attach_pool, detach
from glider_dist.model.sites import fingerprint
from glider_dist.pool import Expert, ExpertPool, Fingerprint
from glider_dist.pool.adapter import CARD_FILE, CONFIG_FILE, GATE_FILE, WEIGHTS_FILE, write_adapter
from glider_dist.pool.names import natural_key
from glider_dist.testing import random_pool, tiny_causal, tiny_qwen, tiny_seq2seq

SITE = "model.layers.0.self_attn.q_proj"


def small_adapter(folder: Path, site: str = SITE, d_in: int = 48, d_out: int = 48, rank: int = 2) -> Path:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, {site: (a, b)}, 4.0, [site], "tiny", "CAUSAL_LM")
    return folder


def empty_pool(folder: Path) -> ExpertPool:
    return ExpertPool.create(folder / "pool", "tiny", fingerprint(tiny_causal()))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_experts_are_numbered_in_natural_order_wherever_the_pool_is_opened(tmp_path: Path) -> None:
    pool = empty_pool(tmp_path)
    adapter = small_adapter(tmp_path / "adapter")
    for name in ("task10", "b", "task9", "task1_10", "task1_9", "a2b10", "a2b9", "10", "9"):
        pool.add(name, adapter)
    wanted = ("9", "10", "a2b9", "a2b10", "b", "task1_9", "task1_10", "task9", "task10")
    assert pool.names == wanted
    assert ExpertPool.open(pool.path).names == wanted


def test_the_natural_order_does_not_depend_on_the_order_of_the_folders() -> None:
    names = ["01", "1", "1.5", "1a", "a", "a01", "a1", "a1b", "a1b2", "a2", "a10", "a-1"]
    for seed in range(50):
        assert sorted(random.Random(seed).sample(names, len(names)), key=natural_key) == names


def test_opening_a_pool_reads_no_weights(tmp_path: Path) -> None:
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=3)
    for name in pool.names:
        for file in (WEIGHTS_FILE, GATE_FILE, CONFIG_FILE):
            (pool.path / "experts" / name / file).write_bytes(b"garbage")
    opened = ExpertPool.open(pool.path)
    assert len(opened) == 3
    assert opened.missing_gates() == []
    assert opened.expert("expert_1").card()["name"] == "expert_1"
    with pytest.raises(GliderError, match="expert_1"):
        opened.expert("expert_1").weights()


def test_a_fill_that_raises_leaves_nothing_behind(tmp_path: Path) -> None:
    pool = empty_pool(tmp_path)

    def fill(folder: Path) -> None:
        small_adapter(folder)
        raise RuntimeError("disk full")

    before = snapshot(pool.path)
    with pytest.raises(RuntimeError, match="disk full"):
        pool.write("expert", fill, {})
    assert snapshot(pool.path) == before
    assert pool.names == ()


def test_a_fill_that_leaves_a_broken_adapter_writes_no_expert(tmp_path: Path) -> None:
    pool = empty_pool(tmp_path)

    def fill(folder: Path) -> None:
        small_adapter(folder)
        (folder / WEIGHTS_FILE).write_bytes(b"half a file")

    before = snapshot(pool.path)
    with pytest.raises(GliderError, match=WEIGHTS_FILE):
        pool.write("expert", fill, {})
    assert snapshot(pool.path) == before


def test_a_failed_replacement_keeps_the_old_expert(tmp_path: Path) -> None:
    pool = empty_pool(tmp_path)
    pool.add("expert", small_adapter(tmp_path / "adapter"))
    before = snapshot(pool.path)
    with pytest.raises(GliderError):
        pool.write("expert", lambda folder: None, {})
    assert snapshot(pool.path) == before


def test_a_replacement_shows_the_new_files_only(tmp_path: Path) -> None:
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=["expert"])
    pool.write("expert", lambda folder: small_adapter(folder, rank=3) and None, {"task": "new"})
    expert = ExpertPool.open(pool.path).expert("expert")
    assert not expert.has_gate
    assert expert.weights()[SITE].A.shape == (3, 48)
    assert expert.card()["task"] == "new"
    assert [path.name for path in (pool.path / "experts").iterdir()] == ["expert"]


def test_what_a_killed_write_leaves_is_no_expert(tmp_path: Path) -> None:
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=["expert"])
    for leftover in (".other.k3j4.tmp", ".expert.4711.old"):
        small_adapter(pool.path / "experts" / leftover)
    (pool.path / "experts" / "notes.txt").write_text("a file is no expert")
    assert ExpertPool.open(pool.path).names == ("expert",)
    assert "other" not in pool


def test_cards_hold_the_hashes_of_an_experts_files(tmp_path: Path) -> None:
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=["with"], gates=True)
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=["without"], gates=False)
    for name, files in (
        ("with", (CONFIG_FILE, WEIGHTS_FILE, GATE_FILE)),
        ("without", (CONFIG_FILE, WEIGHTS_FILE)),
    ):
        folder = pool.expert(name).folder
        assert pool.expert(name).card()["files"] == {file: sha256(folder / file) for file in files}


def test_a_gate_written_later_adds_its_hash_and_keeps_the_card(tmp_path: Path) -> None:
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=["expert"], gates=False)
    expert = pool.expert("expert")
    expert.update_card(task="a task")
    before = expert.card()
    expert.write_gate(
        {site: torch.ones(shape[1]) for site, shape in expert.shapes().items()}, gate_training={"s": 1}
    )
    after = expert.card()
    assert after["files"] == {**before["files"], GATE_FILE: sha256(expert.folder / GATE_FILE)}
    assert after["gate_training"] == {"s": 1}
    assert after["task"] == "a task"
    assert pool.missing_gates() == []


def test_a_gate_that_its_card_does_not_name_is_not_finished(tmp_path: Path) -> None:
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=["done", "killed"])
    killed = pool.expert("killed")
    files = killed.card()["files"]
    del files[GATE_FILE]
    killed.update_card(files=files)
    assert pool.expert("done").has_gate
    assert not killed.has_gate
    assert pool.missing_gates() == ["killed"]


def test_adding_copies_the_adapter_byte_for_byte(tmp_path: Path) -> None:
    pool = empty_pool(tmp_path)
    adapter = small_adapter(tmp_path / "adapter")
    # PEFT writes keys that this package does not know.
    config = {**json.loads((adapter / CONFIG_FILE).read_text()), "peft_version": "0.0.0", "corda_config": None}
    (adapter / CONFIG_FILE).write_text(json.dumps(config))
    (adapter / "README.md").write_text("not part of an expert")
    expert = pool.add("expert", adapter, card={"task": "t"})
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (expert.folder / file).read_bytes() == (adapter / file).read_bytes()
    assert sorted(path.name for path in expert.folder.iterdir()) == sorted([CARD_FILE, CONFIG_FILE, WEIGHTS_FILE])
    assert expert.card()["task"] == "t"


def test_creating_a_pool_twice_opens_the_one_that_is_there(tmp_path: Path) -> None:
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=2)
    before = snapshot(pool.path)
    assert ExpertPool.create(pool.path, "elsewhere", fingerprint(tiny_causal())).names == pool.names
    assert snapshot(pool.path) == before


@pytest.mark.parametrize("typed", ["models/tiny", "~/models/tiny", "models/tiny/config.json"])
def test_a_base_that_is_a_folder_or_file_is_found_from_every_folder(
    typed: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    pool = ExpertPool.create("pool", typed)
    assert pool.base == str(tmp_path / typed.removeprefix("~/"))
    assert ExpertPool.open("pool").base == pool.base
    assert (pool.fingerprint.model_type is not None) == typed.endswith("tiny")


def test_a_base_that_is_a_link_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGUF")
    (tmp_path / "model.gguf").symlink_to("blob")  # as in the hub's cache
    assert ExpertPool.create(tmp_path / "pool", str(tmp_path / "model.gguf")).base.endswith("/model.gguf")


def test_a_pool_is_made_without_a_model_library(tmp_path: Path) -> None:
    code = (
        "import sys; from glider_dist.pool import ExpertPool; ExpertPool.create(sys.argv[1], 'somebody/model')\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "pool")], env=environment(), check=True)


@pytest.mark.parametrize("name", ["somebody/model", "smollm2-135m"])
def test_a_base_by_its_name_is_noted_by_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()  # which the offline default goes before
    pool = ExpertPool.create("pool", name)
    assert pool.base == name
    assert pool.base_origin.startswith(f"pool/pool.json names '{name}' as the pool's base")


def test_a_pool_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    pool = empty_pool(tmp_path)
    value = json.loads((pool.path / "pool.json").read_text())
    (pool.path / "pool.json").write_text(json.dumps({**value, "format": 99}))
    with pytest.raises(GliderError, match="format 99"):
        ExpertPool.open(pool.path)


def test_a_pool_copied_without_its_empty_folders_holds_no_experts(tmp_path: Path) -> None:
    pool = empty_pool(tmp_path)
    (pool.path / "experts").rmdir()
    assert ExpertPool.open(pool.path).names == ()


def peft_model(base: Any, **config: Any) -> PeftModel:
    torch.manual_seed(3)
    task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, task_type=task_type, **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=48, n_head=4, vocab_size=256, n_positions=64)).eval()


ADAPTERS = {
    "patterns": (
        tiny_causal,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7},
            "alpha_pattern": {"v_proj": 3, r"model\.layers\.0\..*q_proj": 9},
        },
    ),
    "rslora": (
        tiny_causal,
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": "all-linear",
            "rank_pattern": {"layers.0.self_attn.q_proj": 1},
            "alpha_pattern": {"o_proj": 2},
        },
    ),
    "one layer only": (
        tiny_qwen,
        {
            "r": 3,
            "target_modules": ["k_proj", "gate_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
    ),
    "a pattern for the names": (tiny_causal, {"r": 2, "target_modules": r".*\.(up|gate)_proj"}),
    "encoder-decoder": (tiny_seq2seq, {"r": 4, "target_modules": ["q", "v", "wi_0"], "lora_alpha": 5}),
    "layers that store their weight transposed": (
        gpt2,
        {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_saved_by_peft_gives_the_same_logits_from_the_pool(case: str, tmp_path: Path) -> None:
    make, config = ADAPTERS[case]
    peft_model(make(), **config).save_pretrained(tmp_path / "adapter")
    # PEFT's own loading is the reference: it reads the folder that the pool copies.
    reference = PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
    model = make()
    pool = ExpertPool.create(tmp_path / "pool", "tiny", fingerprint(model))
    pool.add("expert", tmp_path / "adapter")
    ids = torch.randint(4, 256, (2, 9), generator=torch.Generator().manual_seed(5))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        plain = model(**inputs).logits
        wanted = reference(**inputs).logits
        attach_pool(model, pool, RouterConfig(kind="oracle"))
        with assign_experts(model, torch.zeros(2, dtype=torch.int64)):
            found = model(**inputs).logits
        detach(model)
        again = model(**inputs).logits
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (plain - wanted).abs().max() > 1e-2 * wanted.abs().max()
    assert torch.equal(plain, again)


def test_an_adapter_whose_training_changed_the_base_is_refused(tmp_path: Path) -> None:
    base = tiny_causal()
    config = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    pool = empty_pool(tmp_path)
    with pytest.raises(GliderError, match="pissa changed the base"):
        pool.add("expert", tmp_path / "adapter")


SHAPES = {"a.q": (4, 8), "a.v": (2, 8)}


@pytest.mark.parametrize(
    ("mine", "theirs", "difference"),
    [
        (Fingerprint("llama", SHAPES, "abc"), Fingerprint("llama", dict(reversed(SHAPES.items())), "abc"), None),
        (Fingerprint("llama", SHAPES), Fingerprint("t5", SHAPES), "model type llama against t5"),
        (Fingerprint("llama", SHAPES), Fingerprint("llama", {**SHAPES, "a.q": (4, 9)}), "site a.q"),
        (Fingerprint("llama", SHAPES), Fingerprint("llama", {"a.q": (4, 8)}), "site a.v"),
        (Fingerprint("llama", {"a.q": (4, 8)}), Fingerprint("llama", SHAPES), "site a.v"),
        (Fingerprint("llama", SHAPES, "abc"), Fingerprint("llama", SHAPES, "abd"), "weights abc against abd"),
        # What one side does not know cannot differ.
        (Fingerprint(), Fingerprint("llama", SHAPES, "abc"), None),
        (Fingerprint("llama", SHAPES, "abc"), Fingerprint(), None),
        (Fingerprint("llama", SHAPES, None), Fingerprint("llama", SHAPES, "abc"), None),
    ],
)
def test_fingerprints_differ_in_what_both_sides_know(
    mine: Fingerprint, theirs: Fingerprint, difference: str | None
) -> None:
    found = mine.difference(theirs)
    assert (found is None) if difference is None else (found is not None and difference in found)


def test_a_fingerprint_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    made = ExpertPool.create(tmp_path / "pool", "base", Fingerprint("llama", SHAPES, "abc"))
    assert ExpertPool.open(made.path).fingerprint == made.fingerprint
    assert ExpertPool.open(made.path).base == "base"


def test_models_that_differ_in_size_have_different_fingerprints() -> None:
    found = fingerprint(tiny_causal()).difference(fingerprint(tiny_causal(hidden_size=32)))
    assert found is not None
    assert "model.layers.0" in found
    assert fingerprint(tiny_causal()).difference(fingerprint(tiny_causal(seed=1))) is None


def test_an_expert_is_named_after_its_folder(tmp_path: Path) -> None:
    expert = Expert(tmp_path / "some.name-1")
    assert expert.name == "some.name-1"
    assert not expert.has_gate
    assert expert.card() == {}
