"""The base model on the meta device: every layer and shape, no weights, from ``config.json`` alone."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from glider_dist.config import OFFLINE_DEFAULT, Config
from glider_dist.errors import GliderError, first_line
from glider_dist.model.base import BaseModel, on_meta, tune
from glider_dist.model.download import smollm2_folder


def meta_base(cfg: Config) -> BaseModel:
    """The configured base, on the meta device, with a tokenizer that knows the pad token alone.

    ``dtype=auto`` is bfloat16 for a GPU and float32 for a CPU, whatever this machine has.

    Raises:
        GliderError: there is no ``config.json`` on this machine, or none of a language model.
    """
    source = _config_folder(cfg)
    dtype = _dtype(cfg)
    try:
        model = on_meta(source, dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise GliderError(f"{source}/config.json describes no language model ({first_line(error)})") from error
    model.requires_grad_(False).eval()
    tune(model, torch.device(on_device(cfg)))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>", eos_token="<pad>"
    )
    return BaseModel(model, tokenizer, dtype, torch.device("meta"), str(source), "planned for")


def on_device(cfg: Config) -> str:
    """``cpu`` if the configuration says so, else ``cuda``: what is planned for, not what is here."""
    return "cpu" if cfg.device == "cpu" else "cuda"


def _dtype(cfg: Config) -> torch.dtype:
    if cfg.dtype == "auto":
        return torch.float32 if cfg.device == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, cfg.dtype)
    return dtype


def _config_folder(cfg: Config) -> Path:
    name = cfg.plan.base or cfg.base
    if cfg.plan.base is None and name == OFFLINE_DEFAULT:
        return smollm2_folder()
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or cfg.plan.base is not None:
        raise GliderError(f"plan: {folder} has no config.json; set plan.base to a folder that has one")
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        cached = None
    if isinstance(cached, str):
        return Path(cached).parent
    raise GliderError(
        f"plan: the config.json of base {name!r} is not on this machine; set plan.base to a folder that has it"
    )
