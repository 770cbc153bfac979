"""``adapter_config.json``: what of a PEFT LoRA's settings a routed expert can represent, and its scale."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from glider_dist.errors import GliderError
from glider_dist.pool.files import read_json

CONFIG_FILE = "adapter_config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` and refuse what a routed expert cannot represent.

    Raises:
        GliderError: not LoRA, or DoRA, trained biases, ``modules_to_save`` and the like, with the reason; a rank,
            an alpha or a pattern that is none.
    """
    path = folder / CONFIG_FILE
    config = read_json(path)
    kind = str(config.get("peft_type") or "").upper()
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
    if (config.get("bias") or "none") != "none" or config.get("lora_bias"):
        how = "lora_bias=False" if config.get("lora_bias") else "bias='none'"
        raise GliderError(f"{path}: trained biases cannot be routed; train the adapter with {how}")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise GliderError(
            f"{path}: init_lora_weights={init} changed the base's own weights and cannot be routed; "
            "save the adapter with path_initial_model_for_weight_conversion"
        )
    _check_values(config, path)
    return config


def _check_values(config: dict[str, Any], path: Path) -> None:
    base = config.get("base_model_name_or_path")
    if not isinstance(base, (str, type(None))):
        raise GliderError(f"{path}: base_model_name_or_path is {base!r}, not a name")
    numbers = {"r": config.get("r", 8), "lora_alpha": config.get("lora_alpha", 8)}
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise GliderError(f"{path}: {key} is {pattern!r}, not layers with their values")
        for layers, value in pattern.items():
            try:
                re.compile(layers)
            except re.error as error:
                raise GliderError(
                    f"{path}: {key} has {layers!r}, which is no regular expression: {error}"
                ) from None
            numbers[f"{key} at {layers!r}"] = value
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise GliderError(f"{path}: {key} is {value!r}, not a number")


def _pattern_value(pattern: dict[str, Any], site: str, default: Any) -> Any:
    # PEFT matches a pattern's key against the end of the module name (peft.utils.other.get_pattern_key).
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", site):
            return value
    return default


def scale_at(config: dict[str, Any], site: str, rank: int) -> float:
    """The factor on ``B A`` at a site: alpha / r, or alpha / sqrt(r) under rsLoRA; patterns as in PEFT."""
    alpha = float(_pattern_value(config.get("alpha_pattern") or {}, site, config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
