"""``pool import`` on what people really have on their disks, and on an import that ends early."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from small_jobs import Outcome, command, environment, finish, start
from test_pool_import import change_config, save_adapter

from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import CONFIG_FILE, WEIGHTS_FILE
from glider_dist.pool.sources import PeftFolder
from glider_dist.testing import save_tiny_base, tiny_causal


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_base(tmp_path / "base", tiny_causal())


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapters" / "good", base)


def bring_in(tmp_path: Path, *words: Any) -> Outcome:
    return command("pool", "import", str(tmp_path / "pool"), *map(str, words))


def refused(outcome: Outcome, tmp_path: Path) -> str:
    """All that was said of a refusal, which is one error and leaves nothing."""
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "pool").exists()
    return outcome.out + outcome.errors[0]


CONFIGS: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "empty": (b"", "line 1 is not valid JSON"),
    "cut off": (b'{"peft_type": "LORA",', "line 1 is not valid JSON"),
    "no object": (b"[]", "must hold a JSON object"),
    "not UTF-8": (b'{"peft_type": "\xe9"}', "is not UTF-8 text"),
    "no type": ({"peft_type": None}, "peft_type is missing"),
    "alpha none": ({"lora_alpha": None}, "lora_alpha is None, not a number"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a number"),
    "rank text": ({"r": "8"}, "r is '8', not a number"),
    "pattern list": ({"alpha_pattern": [1]}, "alpha_pattern is [1], not layers with their values"),
    "pattern broken": ({"rank_pattern": {"(": 1}}, "rank_pattern has '(', which is no regular expression"),
    "pattern value": ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern at 'q_proj' is 'x', not a number"),
    "base number": ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5, not a name"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_none_is_refused_by_its_file(case: str, adapter: Path, tmp_path: Path) -> None:
    change, says = CONFIGS[case]
    if isinstance(change, bytes):
        (adapter / CONFIG_FILE).write_bytes(change)
    else:
        change_config(adapter, **change)
    text = refused(bring_in(tmp_path, adapter), tmp_path)
    assert str(adapter / CONFIG_FILE) in text
    assert says in text


@pytest.mark.parametrize("what", ["folder", "link", "lfs", "empty"])
def test_weights_that_are_no_weights_are_refused_by_their_file(what: str, adapter: Path, tmp_path: Path) -> None:
    path = adapter / WEIGHTS_FILE
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n" if what == "lfs" else "")
    text = refused(bring_in(tmp_path, adapter), tmp_path)
    assert str(path) in text
    assert ("git lfs pull" in text) == (what == "lfs")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("", "empty word"),
        ("adapters/good/adapter_config.json", "is one file of an adapter; name its folder, adapters/good"),
        ("adapters/good/adapter_model.safetensors", "is one file of an adapter"),
        ("other.safetensors", "is no adapter: that is a folder with adapter_config.json"),
        ("README.md", "is no adapter"),
        ("archive.zip", "is neither a text file"),
        ("itself.txt", "itself.txt line 2: itself.txt is a list within a list"),
        ("globs.txt", "globs.txt line 1: globs.txt is a list within a list"),
        ("deep", "what lies deeper is found by 'deep/**'"),
        ("none/**", "nothing matches 'none/**'"),
    ],
)
def test_a_word_that_names_no_adapter_is_told_what_would(
    word: str, says: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, "deep/a/b")
    Path("other.safetensors").write_bytes((adapter / WEIGHTS_FILE).read_bytes())
    Path("README.md").write_text("Adapters\n")
    Path("archive.zip").write_bytes(b"PK\x03\x04\xff\xfe")
    Path("itself.txt").write_text("adapters/good\nitself.txt\n")
    Path("globs.txt").write_text("glo*.txt\n")
    assert says in refused(bring_in(tmp_path, word), tmp_path)


def test_odd_names_are_refused_with_the_way_out(adapter: Path, tmp_path: Path) -> None:
    odd = tmp_path / "my adapter (1)"
    shutil.copytree(adapter, odd)
    assert f"or choose a name, as NAME={odd}" in refused(bring_in(tmp_path, odd), tmp_path)
    for run in ("r1", "r2"):
        shutil.copytree(adapter, tmp_path / run / "last")
    change_config(tmp_path / "r2" / "last", lora_alpha=3)
    text = refused(bring_in(tmp_path, tmp_path / "r*" / "last"), tmp_path)
    assert "2 adapters have this name; write NAME=PATH to tell them apart" in text
    assert all(f"this one as NAME={tmp_path / run / 'last'}" in text for run in ("r1", "r2"))
    assert bring_in(tmp_path, f"one={odd}", f"two={tmp_path / 'r1' / 'last'}").code == 0


def test_deep_folders_pools_and_lists_from_windows_are_read(adapter: Path, tmp_path: Path, base: Path) -> None:
    shutil.copytree(adapter, tmp_path / "deep" / "a" / "b" / "one")
    shutil.copytree(adapter, tmp_path / "deep" / "two")
    (tmp_path / "deep" / "notes").mkdir()
    (tmp_path / "list.txt").write_bytes("\ufeffadapters/good\r\n".encode())
    outcome = bring_in(tmp_path, tmp_path / "deep" / "**", tmp_path / "list.txt")
    assert outcome.code == 0, outcome.err
    assert ExpertPool.open(tmp_path / "pool").names == ("good", "one", "two")
    again = command("pool", "import", str(tmp_path / "second"), str(tmp_path / "pool"))
    assert again.code == 0, again.err
    assert ExpertPool.open(tmp_path / "second").names == ("good", "one", "two")


def test_a_trainers_checkpoints_stay_out_silently_and_other_adapters_inside_are_named(
    adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, adapter / "checkpoint-10")
    assert "stay out" not in bring_in(tmp_path, adapter).err
    shutil.copytree(tmp_path / "pool" / "experts" / "good", adapter / "second")
    outcome = bring_in(tmp_path, adapter)
    assert outcome.code == 0
    assert "the adapters in its folders (second) stay out" in outcome.err


@pytest.mark.parametrize("place", ["file", "file/pool", "adapter"])
def test_a_place_that_cannot_be_a_pool_is_told(place: str, adapter: Path, tmp_path: Path) -> None:
    """The pool forgotten on the command line makes the first adapter the pool."""
    (tmp_path / "file").write_text("x")
    target = adapter if place == "adapter" else tmp_path / place
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    before = sorted(adapter.iterdir())
    outcome = command("pool", "import", str(target), str(other))
    assert outcome.code == 2
    says = "is no pool, but holds other files" if place == "adapter" else "no pool can be made"
    assert says in outcome.errors[0]
    assert sorted(adapter.iterdir()) == before


@pytest.mark.parametrize("word", ["base=", "base=adapters"])
def test_a_base_that_is_no_model_is_refused(
    word: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is no model" in refused(bring_in(tmp_path, adapter, word), tmp_path)


PEFTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "DoRA": ("LoraConfig", {"use_dora": True}, "DoRA rescales the base weight"),
    "whole modules": ("LoraConfig", {"modules_to_save": ["lm_head"]}, "it replaces whole modules of the base"),
    "embedding": ("LoraConfig", {"target_modules": ["embed_tokens"]}, "base's own embedding or output head"),
    "head": ("LoraConfig", {"target_modules": ["lm_head"]}, "base's own embedding or output head"),
    "biases": ("LoraConfig", {"bias": "lora_only"}, "trained biases cannot be routed"),
    "tokens": ("LoraConfig", {"trainable_token_indices": [3]}, "it trains embeddings of the base"),
    "PiSSA": ("LoraConfig", {"init_lora_weights": "pissa"}, "changed the base's own weights"),
    "IA3": ("IA3Config", {"feedforward_modules": []}, "peft_type is IA3"),
    "LoHa": ("LoHaConfig", {}, "peft_type is LOHA"),
    "VeRA": ("VeraConfig", {}, "peft_type is VERA"),
    "prompts": ("PromptTuningConfig", {"target_modules": None, "num_virtual_tokens": 2}, "PROMPT_TUNING"),
}


@pytest.mark.parametrize("case", PEFTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_saves_and_nobody_can_route_is_refused_with_its_reason(
    case: str, base: Path, tmp_path: Path
) -> None:
    kind, changes, reason = PEFTS[case]
    words = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes}
    config = getattr(peft, kind)(**{key: value for key, value in words.items() if value is not None})
    peft.get_peft_model(tiny_causal(), config).save_pretrained(tmp_path / "adapter")
    assert reason in refused(bring_in(tmp_path, tmp_path / "adapter", f"base={base}"), tmp_path)


def test_an_import_that_runs_out_of_disk_says_so_and_goes_on_when_run_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [save_adapter(tmp_path / "adapters" / name, base) for name in ("a", "b", "c")]
    fill = PeftFolder.fill

    def full(self: PeftFolder, folder: Path, *rest: Any) -> None:
        if self.name == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        fill(self, folder, *rest)

    monkeypatch.setattr(PeftFolder, "fill", full)
    outcome = bring_in(tmp_path, *folders)
    assert outcome.code == 2
    assert "b cannot be imported from" in outcome.errors[0]
    assert "No space left on device" in outcome.errors[0]
    assert ExpertPool.open(tmp_path / "pool").names == ("a",)
    monkeypatch.undo()
    outcome = bring_in(tmp_path, *folders)
    assert "2 experts imported" in outcome.out
    assert "1 were there already" in outcome.out


def test_an_import_that_is_killed_leaves_whole_experts_and_the_next_ends_it(base: Path, tmp_path: Path) -> None:
    first = save_adapter(tmp_path / "adapters" / "x0", base)
    for index in range(1, 150):
        shutil.copytree(first, first.with_name(f"x{index}"))
    words = [sys.executable, "-m", "glider_dist", "pool", "import", "pool", "adapters"]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    experts = tmp_path / "pool" / "experts"
    while not experts.exists() or len(list(experts.iterdir())) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    pool = ExpertPool.open(tmp_path / "pool")
    assert 0 < len(pool) < 150
    for expert in pool.experts():
        assert {CONFIG_FILE, WEIGHTS_FILE, "card.json"} <= {path.name for path in expert.folder.iterdir()}
    left = len(pool)
    outcome = finish(start(words, tmp_path))
    assert f"{150 - left} experts imported into pool, {left} were there already" in outcome.out
    (experts / ".x3.abc.tmp").mkdir()
    verified = command("pool", "verify", str(tmp_path / "pool"))
    assert verified.code == 2
    assert all("was left by a process that ended early" in line for line in verified.out.splitlines())
    for path in experts.glob(".*.tmp"):
        shutil.rmtree(path)
    assert command("pool", "verify", str(tmp_path / "pool")).out == "150 experts, no problems\n"


def test_an_old_bin_file_whose_tensors_are_views_is_imported(adapter: Path, tmp_path: Path) -> None:
    """torch.save keeps views and shared storage, which safetensors would refuse."""
    tensors = load_file(adapter / WEIGHTS_FILE)
    first, second = list(tensors)[:2]
    whole = torch.cat([tensors[first], tensors[first]])
    half = len(tensors[first])
    (adapter / WEIGHTS_FILE).unlink()
    torch.save({**tensors, first: whole[:half], second: tensors[second].t().t()}, adapter / "adapter_model.bin")
    assert bring_in(tmp_path, adapter).code == 0
    found = load_file(tmp_path / "pool" / "experts" / "good" / WEIGHTS_FILE)
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
    card = json.loads((tmp_path / "pool" / "experts" / "good" / "card.json").read_text())
    assert set(card["origin"]["sha256"]) == {CONFIG_FILE, "adapter_model.bin"}
