"""GGUF files, converted once into ordinary model folders."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from glider_dist.errors import GliderError, first_line
from glider_dist.model.cache import build_once, remembered_sha256

log = logging.getLogger(__name__)


def gguf_folder(file: Path) -> Path:
    """Folder ``<cache>/models/gguf-<first 16 hex digits of the file's SHA-256>`` with the converted model.

    Raises:
        GliderError: the package ``gguf`` is missing, or transformers cannot read the file.
    """

    def build(work: Path) -> Path:
        require_gguf()
        log.info("converting %s, once", file)
        return convert(file, work / "model")

    return build_once(f"gguf-{remembered_sha256(file)[:16]}", build)


def require_gguf() -> None:
    """Raises:
    GliderError: the package ``gguf``, which transformers reads such files with, is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise GliderError(
            "reading a .gguf file needs the package gguf; run `pip install 'glider_dist[quickstart]'`"
        )


def convert(file: Path, folder: Path) -> Path:
    """Write the model in a GGUF file as bfloat16 safetensors with its tokenizer, and return ``folder``.

    Quantised blocks are unpacked, so the weights are those the file stands for, rounded to bfloat16.

    Raises:
        GliderError: transformers cannot read the file, or it lacks weights.
    """
    # Newer transformers may keep the blocks packed; such a model can neither be saved nor trained through.
    gguf_config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    parent, name = str(file.parent), file.name
    try:
        config = AutoConfig.from_pretrained(parent, gguf_file=name)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded: Any = auto.from_pretrained(
            parent, gguf_file=name, config=config, dtype=torch.bfloat16, output_loading_info=True, **unpack
        )
        model, loading = loaded
        tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=name)
    except Exception as error:  # the parsers raise whatever a damaged file makes them meet
        raise GliderError(
            f"transformers cannot read {file} ({type(error).__name__}: {first_line(error)}); check that the "
            f"file is complete and of a supported architecture, "
            f"or pass base=FOLDER with the model in Hugging Face format"
        ) from error
    if loading["missing_keys"]:
        raise GliderError(
            f"{file} lacks weights that a {type(model).__name__} needs, such as "
            f"{min(loading['missing_keys'])}; pass base=FOLDER with the model in Hugging Face format"
        )
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
