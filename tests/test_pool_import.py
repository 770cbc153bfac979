"""``pool import``: what is taken, what is refused with which reason, and what a pool holds afterwards."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_jobs import command, snapshot

import glider_dist as gd
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import CONFIG_FILE, GATE_FILE, WEIGHTS_FILE
from glider_dist.pool.header import info_of, read_header
from glider_dist.testing import random_pool, save_tiny_base, tiny_causal


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_base(tmp_path / "base", tiny_causal())


def save_adapter(folder: Path, base: Path | str, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    torch.manual_seed(len(folder.name))
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], **config}
    model = get_peft_model(tiny_causal(), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings))
    model.to(dtype).save_pretrained(folder)
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**values, "base_model_name_or_path": str(base)}))
    return folder


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **values}))


def change_weights(folder: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(folder / WEIGHTS_FILE), **tensors}, folder / WEIGHTS_FILE)


def test_adapters_of_every_kind_become_experts_with_the_same_bytes(tmp_path: Path, base: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "rank8": {"r": 8, "lora_alpha": 3, "target_modules": "all-linear"},
        "rslora": {"use_rslora": True},
        "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7}},
        "half": {"dtype": torch.float16},
        "bf16": {"dtype": torch.bfloat16},
    }
    for name, config in kinds.items():
        save_adapter(tmp_path / "adapters" / name, base, **config)
    outcome = command("pool", "import", str(tmp_path / "pool"), str(tmp_path / "adapters" / "*"))
    assert outcome.code == 0, outcome.err
    pool = ExpertPool.open(tmp_path / "pool")
    assert set(pool.names) == set(kinds)
    assert pool.base == str(base)
    assert pool.fingerprint.sites
    for name in kinds:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            assert (pool.expert(name).folder / file).read_bytes() == (
                tmp_path / "adapters" / name / file
            ).read_bytes()
    assert pool.expert("bf16").card()["summary"]["dtype"] == "BF16"
    assert pool.expert("patterns").card()["summary"]["rank"] == [2, 4]
    assert command("pool", "verify", str(tmp_path / "pool")).code == 0
    gd.attach_pool(tiny_causal(), pool, gd.RouterConfig(kind="arrow"))


def test_importing_again_changes_nothing(tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    words = ["pool", "import", str(tmp_path / "pool"), str(adapter)]
    assert command(*words).code == 0
    before = snapshot(tmp_path / "pool")
    again = command(*words)
    assert again.code == 0
    assert "already there" in again.out
    assert snapshot(tmp_path / "pool") == before


def test_another_adapter_of_the_same_name_is_refused(tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    words = ["pool", "import", str(tmp_path / "pool"), str(adapter)]
    command(*words)
    change_config(adapter, lora_alpha=99)
    outcome = command(*words)
    assert outcome.code == 2
    assert "has another expert 'adapter'" in outcome.out
    assert command(*words[:3], f"other={adapter}").code == 0
    assert ExpertPool.open(tmp_path / "pool").names == ("adapter", "other")


def test_a_dry_run_writes_nothing(tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    outcome = command("pool", "import", str(tmp_path / "pool"), str(adapter), "--dry-run")
    assert outcome.code == 0
    assert "adapter" in outcome.out
    assert not (tmp_path / "pool").exists()


REFUSALS = {
    "dora": ({"use_dora": True}, {}, "DoRA rescales"),
    "modules": ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
    "bias": ({"bias": "all"}, {}, "trained biases"),
    "ia3": ({"peft_type": "IA3"}, {}, "peft_type is IA3"),
    "embedding": ({}, {"base_model.model.embed.lora_embedding_A": torch.zeros(2, 9)}, "adapts an embedding"),
    "magnitude": ({}, {"base_model.model.q.lora_magnitude_vector": torch.zeros(9)}, "DoRA rescales"),
    "trained head": ({}, {"base_model.model.lm_head.weight": torch.zeros(2, 9)}, "trained output head"),
    "half a pair": ({}, {"base_model.model.x.lora_A.weight": torch.zeros(2, 9)}, "only one of"),
    "integers": (
        {},
        {f"base_model.model.x.lora_{half}.weight": torch.zeros(2, 2, dtype=torch.int8) for half in "AB"},
        "dtype I8",
    ),
    "unknown site": (
        {},
        {f"base_model.model.x.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"},
        "adapts x, which is not a linear layer",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_routed_is_refused_with_its_reason(case: str, tmp_path: Path, base: Path) -> None:
    config, tensors, reason = REFUSALS[case]
    adapter = save_adapter(tmp_path / "adapter", base)
    change_config(adapter, **config)
    change_weights(adapter, **tensors)
    good = save_adapter(tmp_path / "good", base)
    outcome = command("pool", "import", str(tmp_path / "pool"), str(adapter), str(good))
    assert outcome.code == 2
    assert reason in outcome.out
    assert outcome.errors == ["1 of 2 adapters are refused, so nothing is written"]
    assert not (tmp_path / "pool").exists()


def test_an_adapter_for_a_base_of_another_shape_is_refused(tmp_path: Path, base: Path) -> None:
    wide = save_tiny_base(tmp_path / "wide", tiny_causal(hidden_size=64))
    adapter = save_adapter(tmp_path / "adapter", base)
    outcome = command("pool", "import", str(tmp_path / "pool"), str(adapter), f"base={wide}")
    assert outcome.code == 2
    assert "but the base has (64, 64)" in outcome.out


def test_adapters_that_name_different_bases_need_a_base(tmp_path: Path, base: Path) -> None:
    one, two = save_adapter(tmp_path / "one", base), save_adapter(tmp_path / "two", "some/other")
    words = ["pool", "import", str(tmp_path / "pool"), str(one), str(two)]
    assert "different bases" in command(*words).errors[0]
    assert command(*words, f"base={base}").code == 0


def test_two_adapters_of_one_name_are_told_apart_by_the_user(tmp_path: Path, base: Path) -> None:
    one, two = save_adapter(tmp_path / "a" / "x", base), save_adapter(tmp_path / "b" / "x", base, r=2)
    words = ["pool", "import", str(tmp_path / "pool"), str(one)]
    outcome = command(*words, str(two))
    assert outcome.code == 2
    assert "NAME=PATH" in outcome.out
    assert command(*words, f"my-x={two}").code == 0
    assert ExpertPool.open(tmp_path / "pool").names == ("my-x", "x")


def test_a_text_file_lists_adapters(tmp_path: Path, base: Path) -> None:
    for name in ("a", "b", "c"):
        save_adapter(tmp_path / "adapters" / name, base)
    (tmp_path / "list.txt").write_text("# mine\nadapters/a  # one\n\nsecond=adapters/b\n")
    assert command("pool", "import", str(tmp_path / "pool"), str(tmp_path / "list.txt")).code == 0
    assert ExpertPool.open(tmp_path / "pool").names == ("a", "second")
    (tmp_path / "list.txt").write_text("adapters/a\nadapters/zzz/y\n")
    outcome = command("pool", "import", str(tmp_path / "pool"), str(tmp_path / "list.txt"))
    assert "list.txt line 2" in outcome.errors[0]


def test_a_hub_id_without_a_network_is_told_in_one_sentence(tmp_path: Path) -> None:
    outcome = command("pool", "import", str(tmp_path / "pool"), "nobody-here/no-adapter")
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert "nobody-here/no-adapter" in outcome.errors[0]
    assert "no network" in outcome.errors[0]


def test_an_old_bin_file_is_rewritten_as_safetensors(tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, torch.bfloat16)
    tensors = load_file(adapter / WEIGHTS_FILE)
    (adapter / WEIGHTS_FILE).unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    words = ["pool", "import", str(tmp_path / "pool"), str(adapter)]
    assert command(*words).code == 0
    found = load_file(tmp_path / "pool" / "experts" / "adapter" / WEIGHTS_FILE)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == torch.bfloat16 for key in tensors)
    assert "already there" in command(*words).out


class Danger:
    def __reduce__(self) -> Any:
        return exec, ("import pathlib; pathlib.Path('pwned').touch()",)


def test_a_pickle_that_would_run_code_is_refused(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = save_adapter(tmp_path / "adapter", base)
    (adapter / WEIGHTS_FILE).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({"a": Danger()}))
    outcome = command("pool", "import", "pool", str(adapter))
    assert outcome.code == 2
    assert "is not loaded" in outcome.out
    torch.save({"a": Danger()}, tmp_path / "pool.pt")
    assert "is not loaded" in command("pool", "import", "pool", "pool.pt", f"base={base}").errors[0]
    assert not (tmp_path / "pwned").exists()


def test_a_gate_beside_an_adapter_comes_along_and_must_fit(tmp_path: Path, base: Path) -> None:
    pool = random_pool(tmp_path / "first", tiny_causal(), experts=["x"], base=str(base))
    assert command("pool", "export", str(pool.path), str(tmp_path / "out")).code == 0
    assert command("pool", "import", str(tmp_path / "second"), str(tmp_path / "out"), f"base={base}").code == 0
    assert ExpertPool.open(tmp_path / "second").missing_gates() == []
    save_file({"other.site": torch.ones(3)}, tmp_path / "out" / "x" / GATE_FILE)
    outcome = command("pool", "import", str(tmp_path / "third"), str(tmp_path / "out"), f"base={base}")
    assert "the gate of expert 'x' lacks site" in outcome.out


def _import(words: list[str]) -> int:
    return command(*words).code


def test_processes_that_import_into_one_pool_at_once_lose_nothing(tmp_path: Path, base: Path) -> None:
    folders = [str(save_adapter(tmp_path / "adapters" / f"x{i}", base)) for i in range(6)]
    jobs = [
        ["pool", "import", str(tmp_path / "pool"), *folders[:4]],
        ["pool", "import", str(tmp_path / "pool"), *folders[2:]],
    ]
    with multiprocessing.get_context("spawn").Pool(2) as workers:
        assert workers.map(_import, jobs) == [0, 0]
    pool = ExpertPool.open(tmp_path / "pool")
    assert len(pool) == 6
    assert command("pool", "verify", str(pool.path)).code == 0
    assert not [path for path in (pool.path / "experts").iterdir() if path.name.startswith(".")]


def test_a_header_is_what_the_tensors_are(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros(0, 2),
        "c": torch.zeros(4, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert read_header(tmp_path / "x.safetensors") == {key: info_of(value) for key, value in tensors.items()}


@pytest.mark.parametrize("length", [0, 5, 60, -1])
def test_a_file_cut_off_anywhere_is_refused(length: int, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:length])
    with pytest.raises(gd.GliderError, match="cannot be read"):
        read_header(tmp_path / "x.safetensors")


def test_a_base_below_the_home_folder_is_at_hand(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    adapter = save_adapter(tmp_path / "adapter", base)
    outcome = command("pool", "import", str(tmp_path / "pool"), str(adapter), "base=~/base")
    assert outcome.code == 0, outcome.err
    assert ExpertPool.open(tmp_path / "pool").fingerprint.sites
    (tmp_path / "empty").mkdir()
    outcome = command("pool", "import", str(tmp_path / "other"), str(adapter), "base=~/empty")
    assert "is no model" in outcome.errors[0]
