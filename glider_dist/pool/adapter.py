"""One expert on disk: a PEFT LoRA folder read into plain tensors, and plain tensors written as a PEFT folder.

Shapes: A ``[r, d_in]``, B ``[d_out, r]``. Keys in the file are PEFT's:
``base_model.model.{site}.lora_A.weight`` and ``...lora_B.weight``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from glider_dist.errors import GliderError
from glider_dist.pool.files import read_json, write_json, write_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
GATE_FILE = "gate.safetensors"
CARD_FILE = "card.json"
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<site>.+)\.lora_(?P<which>[AB])(?:\.[^.]+)?\.weight")


@dataclass(frozen=True)
class SiteLora:
    """The expert at one site: ``A [r, d_in]``, ``B [d_out, r]`` and the factor on ``B A``."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float


def _pattern_value(pattern: dict[str, Any], site: str, default: Any) -> Any:
    # PEFT matches a pattern's key against the end of the module name (peft.utils.other.get_pattern_key).
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", site):
            return value
    return default


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` and refuse what a routed expert cannot represent.

    Raises:
        GliderError: not LoRA, or DoRA, trained biases, ``modules_to_save`` and the like, with the reason.
    """
    path = folder / CONFIG_FILE
    config = read_json(path)
    if not isinstance(config, dict):
        raise GliderError(f"{path} must hold a JSON object")
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise GliderError(f"{path}: peft_type is {kind or 'missing'}; only LORA adapters can be experts")
    refusals = {
        "use_dora": "DoRA rescales the base weight itself, so its output is not a sum over experts",
        "modules_to_save": "it replaces whole modules of the base, which experts of one pool cannot share",
        "trainable_token_indices": "it trains embeddings of the base, which experts of one pool cannot share",
        "layer_replication": "it changes the layers of the base",
        "target_parameters": "it adapts bare parameters, not linear layers",
        "alora_invocation_tokens": "it acts only behind certain tokens",
        "use_qalora": "it pools a layer's input in groups",
        "use_bdlora": "its matrices are block-diagonal",
        "kasa_config": "it changes the base's own weights",
    }
    for key, reason in refusals.items():
        if config.get(key):
            raise GliderError(f"{path}: {key} is set and cannot be routed: {reason}")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise GliderError(f"{path}: trained biases cannot be routed; train the adapter with bias='none'")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise GliderError(
            f"{path}: init_lora_weights={init} changed the base's own weights and cannot be routed; "
            "save the adapter with path_initial_model_for_weight_conversion"
        )
    return config


def read_adapter(folder: Path) -> dict[str, SiteLora]:
    """Read every site of the PEFT LoRA in ``folder``; sites are dotted names in the base model.

    Raises:
        GliderError: a missing or broken file, an unknown tensor, a half pair, or ranks that do not match.
    """
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise GliderError(f"{path} does not exist; an adapter's weights must be safetensors")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is not iterable)
                match = _KEY.fullmatch(key)
                if not match:
                    raise GliderError(f"{path}: tensor {key!r} is neither lora_A nor lora_B of a linear layer")
                halves.setdefault(match["site"], {})[match["which"]] = file.get_tensor(key)
    except SafetensorError as error:
        raise GliderError(f"{path} cannot be read ({error}); copy it again") from None
    sites = {}
    for site, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise GliderError(f"{path}: site {site} has only one of lora_A and lora_B")
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise GliderError(f"{path}: site {site} has A {list(a.shape)} and B {list(b.shape)}, which do not fit")
        alpha = float(_pattern_value(config.get("alpha_pattern") or {}, site, config.get("lora_alpha", 8)))
        rank = a.shape[0]
        sites[site] = SiteLora(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    if not sites:
        raise GliderError(f"{path} holds no LoRA weights")
    return sites


def site_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """``{site: (d_out, d_in)}`` of an adapter, read from the file's header only.

    Raises:
        GliderError: if the file is missing or broken.
    """
    dims: dict[str, dict[str, list[int]]] = {}
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if match := _KEY.fullmatch(key):
                    dims.setdefault(match["site"], {})[match["which"]] = file.get_slice(key).get_shape()
    except (OSError, SafetensorError) as error:
        raise GliderError(f"{path} cannot be read ({error}); copy it again") from None
    return {site: (pair["B"][0], pair["A"][1]) for site, pair in dims.items() if len(pair) == 2}


def read_gate(path: Path) -> dict[str, torch.Tensor]:
    """Read the raw gate vectors ``{site: v [d_in]}``.

    Raises:
        GliderError: if the file is missing or broken.
    """
    if not path.exists():
        raise GliderError(f"{path} does not exist: train the gate (train-gates) or use a router without gates")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise GliderError(f"{path} cannot be read ({error}); train the gate again") from None


def write_adapter(
    folder: Path,
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]],
    alpha: float,
    target_modules: list[str],
    base: str,
    task_type: str,
) -> None:
    """Write ``{site: (A, B)}`` of one rank as a PEFT LoRA that ``PeftModel.from_pretrained`` loads."""
    rank = next(iter(weights.values()))[0].shape[0]
    tensors = {}
    for site, (a, b) in weights.items():
        tensors[f"base_model.model.{site}.lora_A.weight"] = a
        tensors[f"base_model.model.{site}.lora_B.weight"] = b
    write_tensors(folder / WEIGHTS_FILE, tensors)
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": target_modules,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    write_json(folder / CONFIG_FILE, config)
