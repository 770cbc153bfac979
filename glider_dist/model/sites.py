"""Sites: the linear layers of a base model that experts may adapt, found from the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from glider_dist.errors import GliderError
from glider_dist.pool import Fingerprint
from glider_dist.pool.adapter import target_modules

# Names, at the top of a model or of its encoder or decoder, of what a task puts on top of a language model.
_HEADS = frozenset(("lm_head", "cls", "classifier", "score", "qa_outputs", "classification_head", "embed_out"))


@dataclass(frozen=True)
class Site:
    """One linear layer: its dotted name, the module, and ``(d_out, d_in)``."""

    name: str
    module: nn.Module
    shape: tuple[int, int]


def _shape(module: nn.Module) -> tuple[int, int] | None:
    # Widths, not weight.shape: ZeRO 3 and quantised layers keep no full weight.
    if type(module).__name__ == "Conv1D" and hasattr(module, "nx"):
        return int(module.nf), int(module.nx)  # type: ignore[arg-type]
    # The layers of GPTQ, AWQ, HQQ and AQLM are no nn.Linear. What holds other layers (PEFT's) is no single one.
    if isinstance(module, nn.Linear) or next(module.children(), None) is None:
        widths = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if isinstance(widths[0], int) and isinstance(widths[1], int):
            return widths[0], widths[1]
    return None


def language_model(model: nn.Module) -> nn.Module:
    """What the tokens of a model with one stack run through: no head, and nothing that embeds images or sound."""
    body: Any = getattr(model, "base_model", model)
    # OPT and BART call it themselves, past the body. ModernBERT's head has the name by which it is looked for.
    inner: Any = model.get_decoder() if hasattr(model, "get_decoder") else body  # type: ignore[operator]
    return inner if isinstance(inner, PreTrainedModel) else body


def every_linear(model: nn.Module) -> dict[str, Site]:
    """Every linear layer in the model's order, without heads (the output head, as PEFT's "all-linear" leaves it
    out, and those for classification) and poolers, whose output no token sees."""
    whole: Any = model
    head = whole.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    sites = {}
    for name, module in model.named_modules():
        shape = _shape(module)
        if shape is not None and module is not head and not _on_top(name):
            sites[name] = Site(name, module, shape)
    return sites


def linear_sites(model: nn.Module, targets: list[str] | None = None) -> dict[str, Site]:
    """The linear layers that tokens pass: :func:`every_linear` but those that make embeddings of images or sound.

    Args:
        targets: keep the layers whose dotted name ends with one of these; empty or None keeps all.

    Raises:
        GliderError: if a target names no layer.
    """
    towers: set[nn.Module] = set()
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        towers = {*getattr(model, "base_model", model).modules()} - {*language_model(model).modules()}
    sites = {name: site for name, site in every_linear(model).items() if site.module not in towers}
    if not targets:
        return sites
    for target in targets:
        if not any(_ends_with(name, target) for name in sites):
            kinds = sorted({name.rsplit(".", 1)[-1] for name in sites})
            raise GliderError(
                f"lora.targets: no linear layer ends with {target!r}; the model has {', '.join(kinds)}"
            )
    return {name: site for name, site in sites.items() if any(_ends_with(name, target) for target in targets)}


def _on_top(name: str) -> bool:
    parts = name.split(".")
    inner = parts[0] in ("encoder", "decoder") and len(parts) > 1
    return "pooler" in parts or parts[1 if inner else 0] in _HEADS


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def peft_targets(chosen: dict[str, Site], model: nn.Module) -> list[str]:
    """:func:`~glider_dist.pool.adapter.target_modules` with which PEFT finds exactly these layers of ``model``.

    Raises:
        GliderError: there are none.
    """
    if not chosen:
        raise GliderError(f"no linear layer was found in this {type(model).__name__} that an expert could adapt")
    return target_modules(chosen, (name for name, _ in model.named_modules()), whole=True)


def check_bare(model: nn.Module) -> None:
    """Raises GliderError if it is no bare model: the names of a wrapper's layers are not those of the base."""
    wrapped = isinstance(getattr(model, "module", None), nn.Module) and not isinstance(model, PreTrainedModel)
    if wrapped or hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise GliderError(
            f"this {type(model).__name__} wraps a model or holds PEFT adapters; attach the pool to the bare model "
            "(model.module, model.unload())"
        )


def fingerprint(model: nn.Module, weights: str | None = None) -> Fingerprint:
    """The base's fingerprint: model type, every linear layer's shape, and the weights' hash if known."""
    config: Any = getattr(model, "config", None)
    shapes = {name: site.shape for name, site in every_linear(model).items()}
    return Fingerprint(getattr(config, "model_type", None), shapes, weights)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
