"""Loading a base from a folder or the hub: dtype, device, padding side, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from base_models import CPU, saved, start_python, tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM

from glider_dist.errors import GliderError
from glider_dist.model import base as base_module
from glider_dist.model.base import choose_dtype, load_base
from glider_dist.model.cache import weights_hash
from glider_dist.testing import tiny_encoder_decoder, tiny_seq2seq


def test_a_causal_folder_loads_frozen_in_eval_mode_and_pads_on_the_left(tmp_path: Path) -> None:
    folder = saved(tmp_path / "llama", tiny_llama())
    base = load_base(str(folder), dtype="float32", device="cpu")
    assert isinstance(base.model, LlamaForCausalLM)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32} == {base.dtype}
    assert (base.device, base.source, base.reason) == (CPU, str(folder), "float32: asked for")
    assert base.tokenizer.pad_token == "</s>"
    assert base.model.config.pad_token_id == base.model.generation_config.pad_token_id == 2
    batch = base.tokenizer(["a", "bce"], return_tensors="pt", padding=True)
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_left_padding_does_not_change_a_greedy_answer(tmp_path: Path) -> None:
    base = load_base(str(saved(tmp_path / "llama", tiny_llama())), dtype="float32", device="cpu")

    def answers(texts: list[str]) -> list[list[int]]:
        batch = base.tokenizer(texts, return_tensors="pt", padding=True)
        output = base.model.generate(**batch, max_new_tokens=6, do_sample=False)
        return output[:, batch["input_ids"].shape[1] :].tolist()

    assert answers(["ab", "a longer text"])[0] == answers(["ab"])[0]


def test_an_encoder_decoder_folder_loads_as_such_and_keeps_padding_on_the_right(tmp_path: Path) -> None:
    base = load_base(str(saved(tmp_path / "t5", tiny_seq2seq(), tiny_tokenizer(pad_token="<unk>"))), device="cpu")
    assert isinstance(base.model, type(tiny_seq2seq()))
    assert base.tokenizer.pad_token == "<unk>"
    assert base.tokenizer.padding_side == "right"


def test_two_joined_encoders_load_as_an_encoder_decoder_model(tmp_path: Path) -> None:
    base = load_base(str(saved(tmp_path / "bert2bert", tiny_encoder_decoder())), device="cpu")
    assert isinstance(base.model, type(tiny_encoder_decoder()))
    labels = torch.tensor([[3, 4, 2]])
    assert torch.isfinite(base.model(input_ids=labels, labels=labels).loss)


def test_a_folder_without_config_json_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(GliderError, match=rf"{tmp_path} has no config\.json"):
        load_base(str(tmp_path), device="cpu")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_seq2seq().save_pretrained(tmp_path / "t5")
    with pytest.raises(GliderError, match=f"{tmp_path / 't5'} has no tokenizer files"):
        load_base(str(tmp_path / "t5"), device="cpu")


def test_a_tokenizer_without_pad_and_end_token_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "llama", tiny_llama(), tiny_tokenizer(eos_token=None))
    with pytest.raises(GliderError, match="neither a pad nor an end token"):
        load_base(str(folder), device="cpu")


def test_truncated_weights_are_reported_with_their_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "llama", tiny_llama())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(GliderError, match=f"cannot load the base {folder}"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize("base", ["./no/such/folder", "no/such/folder", "/no such"])
def test_a_missing_folder_is_told_from_a_hub_id(base: str) -> None:
    with pytest.raises(GliderError, match="there is no folder"):
        load_base(base, device="cpu")


def test_a_hub_id_is_taken_from_the_cache_and_without_network_refused_in_one_sentence(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    folder = saved(repository / "snapshots" / ("0" * 40), tiny_llama())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    code = (
        "from glider_dist.errors import GliderError\n"
        "from glider_dist.model.base import load_base\n"
        "base = load_base('someone/tiny', device='cpu')\n"
        "print(base.source, base.weights_hash)\n"
        "try:\n    load_base('someone/absent', device='cpu')\n"
        "except GliderError as error:\n    print(error)\n"
    )
    process = start_python(code, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "hub"))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    cached, refused = output.splitlines()
    assert cached == f"someone/tiny {weights_hash(folder)}"
    assert refused.startswith("no network and no cached copy of 'someone/absent'; pass base=FOLDER")


def test_a_download_that_breaks_off_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("peer closed connection\nwithout sending the complete message body")

    monkeypatch.setattr(base_module, "hf_hub_download", lambda *_: None)
    monkeypatch.setattr(base_module, "snapshot_download", broken)
    with pytest.raises(
        GliderError, match=r"^'some/model' broke off while it was fetched \(peer closed connection\)"
    ):
        base_module.fetch_base("some/model")


def test_an_asked_for_dtype_is_obeyed_and_an_unknown_one_refused() -> None:
    assert choose_dtype("bfloat16", CPU) == (torch.bfloat16, "bfloat16: asked for")
    with pytest.raises(GliderError, match="dtype is 'float8'"):
        choose_dtype("float8", CPU)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/cpuinfo")
def test_auto_dtype_on_cpu_follows_the_processor_with_and_without_torch_knowing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    fast = "avx512_bf16" in flags or "amx_bf16" in flags
    expected = torch.bfloat16 if fast else torch.float32
    assert choose_dtype("auto", CPU)[0] == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_dtype("auto", CPU)[0] == expected


@pytest.mark.parametrize(
    ("capabilities", "expected", "phrase"),
    [
        ({"avx2": True, "avx512_bf16": False}, torch.float32, "neither avx512_bf16 nor amx_bf16"),
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, "avx512_bf16 and amx_bf16"),
        ({"amx_bf16": True}, torch.bfloat16, "has amx_bf16"),
    ],
)
def test_the_reason_for_a_dtype_names_the_instructions(
    capabilities: dict[str, bool], expected: torch.dtype, phrase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_module.platform, "system", lambda: "Linux")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    dtype, reason = choose_dtype("auto", CPU)
    assert dtype == expected
    assert phrase in reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_model_loads_there_in_its_native_dtype(tmp_path: Path) -> None:
    base = load_base(str(saved(tmp_path / "llama", tiny_llama())))
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert base.dtype == (torch.bfloat16 if native else torch.float32)
    assert base.device == torch.device("cuda", torch.cuda.current_device()) == base.model.device


@pytest.mark.parametrize("device", ["tpu", "meta", f"cuda:{torch.cuda.device_count()}"])
def test_a_device_that_is_unknown_or_absent_is_refused(device: str, tmp_path: Path) -> None:
    with pytest.raises(GliderError, match=f"device is '{device}'"):
        load_base(str(tmp_path), device=device)
