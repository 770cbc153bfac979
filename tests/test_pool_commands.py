"""``pool ls | show | verify | remove | add | export | pack | unpack``: what they print, write and refuse."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from small_jobs import command, describe_and_index, snapshot
from transformers import PreTrainedModel

import glider_dist as gd
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import CARD_FILE, CONFIG_FILE, GATE_FILE, WEIGHTS_FILE
from glider_dist.pool.adapter_config import read_config
from glider_dist.testing import random_pool, save_tiny_base, tiny_causal, tiny_encoder_decoder, tiny_seq2seq


@pytest.fixture
def pool(tmp_path: Path) -> ExpertPool:
    base = save_tiny_base(tmp_path / "base", tiny_causal())
    return random_pool(
        tmp_path / "pool",
        tiny_causal(),
        experts=["a", "b", "c"],
        ranks=[2, 4, 3],
        sites=[None, ["q_proj"], None],
        base=str(base),
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def merged_logits(pool: ExpertPool) -> torch.Tensor:
    model = tiny_causal()
    return logits(gd.attach_pool(model, pool, gd.RouterConfig(kind="merged")))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_a_list_shows_every_expert_and_the_totals(pool: ExpertPool) -> None:
    pool.expert("a").update_card(descriptions=["It sorts."], scores={"validation_loss": 0.5})
    outcome = command("pool", "ls", str(pool.path))
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["name", "rank", "sites", "MB", "dtype", "gate", "loss", "description"]
    assert lines[1].split()[0] == "a"
    assert "0.500" in lines[1]
    assert "It sorts." in lines[1]
    assert lines[-1].startswith("3 experts for ")
    assert "1 described" in lines[-1]


def test_an_expert_is_shown_with_its_layers_and_hashes(pool: ExpertPool) -> None:
    outcome = command("pool", "show", str(pool.path), "b")
    assert "q_proj" in outcome.out
    assert pool.expert("b").card()["files"][WEIGHTS_FILE] in outcome.out
    assert command("pool", "show", str(pool.path), "z").code == 2


def test_a_pool_in_order_is_verified(pool: ExpertPool) -> None:
    describe_and_index(pool)
    outcome = command("pool", "verify", str(pool.path))
    assert (outcome.code, outcome.out) == (0, "3 experts, no problems\n")


def test_everything_that_is_wrong_is_listed_at_once(pool: ExpertPool, tmp_path: Path) -> None:
    describe_and_index(pool)
    folders = {name: pool.expert(name).folder for name in pool.names}
    tensors = load_file(folders["a"] / WEIGHTS_FILE)
    first = next(iter(tensors))
    tensors[first][0, 0] = float("nan")
    save_file(tensors, folders["a"] / WEIGHTS_FILE)
    gate = load_file(folders["b"] / GATE_FILE)
    gate.pop(next(iter(gate)))
    save_file(gate, folders["b"] / GATE_FILE)
    (folders["c"] / CARD_FILE).unlink()
    (folders["c"] / "old.bin").write_bytes(b"x")
    (folders["c"] / "link.json").symlink_to(tmp_path / "base" / "config.json")
    outcome = command("pool", "verify", str(pool.path))
    assert outcome.code == 2
    for words in (
        f"{folders['a'] / WEIGHTS_FILE} has changed",
        "expert 'a' has values in lora_",
        "the gate of expert 'b' lacks site",
        "hashes are unknown",
        "may be a pickle",
        "leaves the pool",
        "run index again",
    ):
        assert words in outcome.out


def test_an_expert_that_is_a_link_out_of_the_pool_is_refused(pool: ExpertPool, tmp_path: Path) -> None:
    (pool.path / "experts" / "d").symlink_to(tmp_path / "base")
    outcome = command("pool", "ls", str(pool.path))
    assert outcome.code == 2
    assert "leaves the pool" in outcome.errors[0]


def test_removing_checks_all_names_first(pool: ExpertPool) -> None:
    before = snapshot(pool.path)
    assert command("pool", "remove", str(pool.path), "a", "z").code == 2
    assert snapshot(pool.path) == before
    assert command("pool", "remove", str(pool.path), "a", "c").code == 0
    assert ExpertPool.open(pool.path).names == ("b",)


def test_one_adapter_is_added_with_a_gate(pool: ExpertPool) -> None:
    folder = pool.expert("a").folder
    words = ["pool", "add", str(pool.path), "d", str(folder), f"gate={folder / GATE_FILE}"]
    assert command(*words).code == 0
    assert ExpertPool.open(pool.path).expert("d").has_gate


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fly"], "pool does import"),
        (["ls"], "takes POOL"),
        (["ls", "P", "names=a"], "pool ls does not know 'names=a'"),
        (["ls", "P", "--dry-run"], "--dry-run belongs"),
        (["ls", "nowhere"], "is not a pool"),
    ],
)
def test_a_wrong_call_is_told(words: list[str], says: str) -> None:
    outcome = command("pool", *words)
    assert outcome.code == 2
    assert says in outcome.errors[0]


def test_help_explains_the_actions() -> None:
    assert "pool import POOL ADAPTER" in command("pool", "--help").out


def test_exported_folders_have_the_same_bytes_and_load_in_peft(pool: ExpertPool, tmp_path: Path) -> None:
    assert command("pool", "export", str(pool.path), str(tmp_path / "out"), "names=a,b").code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    for file in (CONFIG_FILE, WEIGHTS_FILE, GATE_FILE):
        assert (tmp_path / "out" / "a" / file).read_bytes() == (pool.expert("a").folder / file).read_bytes()
    PeftModel.from_pretrained(tiny_causal(), tmp_path / "out" / "a")


def test_the_merged_adapter_and_the_merged_model_equal_the_merged_router(pool: ExpertPool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    wanted = merged_logits(pool)
    words = ["pool", "export", str(pool.path)]
    assert command(*words, str(tmp_path / "adapter"), "format=merged").code == 0
    adapter = PeftModel.from_pretrained(tiny_causal(), tmp_path / "adapter").eval()
    assert difference(logits(adapter), wanted) < 1e-5
    outcome = command(*words, str(tmp_path / "model"), "format=model", "dtype=float32")
    assert outcome.code == 0, outcome.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert difference(logits(model), wanted) < 1e-5
    assert command(*words, str(tmp_path / "model"), "format=model").code == 2


def test_a_model_is_exported_where_the_base_has_moved(tmp_path: Path) -> None:
    here = save_tiny_base(tmp_path / "here", tiny_causal())
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=2, base=str(here))
    there = here.rename(tmp_path / "there")
    words = ["pool", "export", str(pool.path), str(tmp_path / "model"), "format=model"]
    gone = command(*words)
    assert gone.code == 2
    assert "give base=FOLDER" in gone.errors[0]
    done = command(*words, f"base={there}")
    assert done.code == 0, done.err
    assert (tmp_path / "model" / "config.json").exists()
    wrong = command("pool", "export", str(pool.path), str(tmp_path / "out"), f"base={there}")
    assert "base= belongs to format=model and format=vllm" in wrong.errors[0]


@pytest.mark.parametrize("make", [tiny_causal, tiny_seq2seq, tiny_encoder_decoder])
def test_peft_adapts_exactly_the_merged_adapters_layers_and_no_head_or_pooler(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    pool = random_pool(tmp_path / "pool", make(), 2)
    assert command("pool", "export", str(pool.path), str(tmp_path / "out"), "format=merged").code == 0
    adapted = PeftModel.from_pretrained(make(), tmp_path / "out").base_model.model
    found = {name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    assert found == pool.fingerprint.sites.keys()
    short = all("." not in target for target in read_config(tmp_path / "out")["target_modules"])
    assert short == (make is not tiny_encoder_decoder)


def test_the_script_for_vllm_names_every_expert(pool: ExpertPool, tmp_path: Path) -> None:
    assert command("pool", "export", str(pool.path), str(tmp_path / "out"), "format=vllm").code == 0
    vllm = tmp_path / "bin" / "vllm"
    vllm.parent.mkdir()
    vllm.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    vllm.chmod(0o755)

    def started(*words: str) -> list[str]:
        return subprocess.run(
            [tmp_path / "out" / "vllm.sh", *words],
            env={"PATH": f"{vllm.parent}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()

    options = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "3", "--lora-modules"]
    modules = [f"{name}={tmp_path / 'out' / name}" for name in "abc"]
    assert started() == ["serve", pool.base, *options, *modules]
    assert started("--port", "1") == ["serve", pool.base, *options, *modules, "--port", "1"]
    assert started("my base", "--port", "1") == ["serve", "my base", *options, *modules, "--port", "1"]


def test_a_packed_pool_is_unpacked_as_it_was(pool: ExpertPool, tmp_path: Path) -> None:
    assert command("pool", "pack", str(pool.path), str(tmp_path / "p.tar")).code == 0
    assert command("pool", "unpack", str(tmp_path / "p.tar"), str(tmp_path / "again")).code == 0

    def content(root: Path) -> dict[Path, bytes]:
        return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    assert content(tmp_path / "again") == content(pool.path)
    assert command("pool", "unpack", str(tmp_path / "p.tar"), str(tmp_path / "again")).code == 2


@pytest.mark.parametrize("case", ["../evil.json", "/tmp/evil.json", "x.bin", "link", "cut"])
def test_a_tar_with_tricks_in_it_is_refused_and_leaves_nothing(
    case: str, pool: ExpertPool, tmp_path: Path
) -> None:
    file = tmp_path / "p.tar"
    command("pool", "pack", str(pool.path), str(file))
    if case == "cut":
        file.write_bytes(file.read_bytes()[:3000])
    else:
        with tarfile.open(file, "a") as archive:
            info = tarfile.TarInfo("experts/a/x.json" if case == "link" else case)
            if case == "link":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(info)
            else:
                info.size = 2
                archive.addfile(info, io.BytesIO(b"{}"))
    before = sorted(tmp_path.iterdir())
    assert command("pool", "unpack", str(file), str(tmp_path / "again")).code == 2
    assert sorted(tmp_path.iterdir()) == before
