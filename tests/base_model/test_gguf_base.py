"""A GGUF file becomes a folder, once, however many processes start and end meanwhile."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from base_models import llama_as_gguf, scratch_left_in, start_python, tiny_llama
from transformers import LlamaForCausalLM

from glider_dist.errors import GliderError
from glider_dist.model.base import load_base
from glider_dist.model.cache import build_once


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
