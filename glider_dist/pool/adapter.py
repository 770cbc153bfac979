"""One expert on disk: a PEFT LoRA folder read into plain tensors, and plain tensors written as a PEFT folder.

Shapes: A ``[r, d_in]``, B ``[d_out, r]``. Keys in the file are PEFT's:
``base_model.model.{site}.lora_A.weight`` and ``...lora_B.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from glider_dist.errors import GliderError
from glider_dist.pool.adapter_config import CONFIG_FILE, read_config, scale_at
from glider_dist.pool.files import write_json, write_tensors
from glider_dist.pool.header import TensorInfo, read_header

WEIGHTS_FILE = "adapter_model.safetensors"
GATE_FILE = "gate.safetensors"
CARD_FILE = "card.json"
EXPERT_FILES = (CONFIG_FILE, WEIGHTS_FILE, GATE_FILE)
"""What makes an expert; the gate may be missing."""
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<site>.+)\.lora_(?P<which>[AB])(?:\.[^.]+)?\.weight")
_UNROUTABLE_TENSORS = {
    "lora_embedding_": "it adapts an embedding, which has no input to route",
    "lora_magnitude_vector": "DoRA rescales the base weight itself, so its output is not a sum over experts",
    "modules_to_save": "it replaces a whole module of the base, which experts of one pool cannot share",
    ".base_layer.": "it brings the base's own embedding or output head along, which it adapts",
    "embed_tokens.weight": "it holds trained embeddings, which experts of one pool cannot share",
    "lm_head.weight": "it holds a trained output head, which experts of one pool cannot share",
    ".bias": "trained biases cannot be routed",
}
# What models carry on top of the layers that experts may adapt.
_ON_TOP = (
    "lm_head", "lm_head.dense", "lm_head.decoder", "embed_out", "cls.predictions.transform.dense",
    "cls.predictions.decoder", "pooler.dense", "score", "classifier", "classifier.dense", "classifier.out_proj",
    "classification_head.dense", "classification_head.out_proj", "qa_outputs",
)  # fmt: skip


@dataclass(frozen=True)
class SiteLora:
    """The expert at one site: ``A [r, d_in]``, ``B [d_out, r]`` and the factor on ``B A``."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float


@dataclass(frozen=True)
class AdapterInfo:
    """What the names, shapes and dtypes of an adapter's tensors tell.

    Attributes:
        keys: ``{site: (name of A, name of B)}`` in the file.
        shapes: ``{site: (d_out, d_in)}``.
        ranks: ``{site: r}``.
        dtype: ``F32``, ``BF16``, ``F16`` or ``F64``; ``mixed`` if the sites differ.
        size: bytes of all tensors.
    """

    keys: dict[str, tuple[str, str]]
    shapes: dict[str, tuple[int, int]]
    ranks: dict[str, int]
    dtype: str
    size: int

    def summary(self) -> dict[str, Any]:
        """The part that a table of experts shows, for the card."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        return {"sites": len(self.ranks), "rank": [low, high], "dtype": self.dtype, "bytes": self.size}


def pair_up(tensors: Mapping[str, TensorInfo], where: str) -> AdapterInfo:
    """Sort an adapter's tensors into pairs of A and B.

    Raises:
        GliderError: a tensor that cannot be routed, a half pair, ranks that do not match, an unknown dtype, or no
            LoRA weights at all; the message starts with ``where``.
    """
    halves: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = _KEY.fullmatch(key)
        if not match:
            reason = next((text for part, text in _UNROUTABLE_TENSORS.items() if part in key), None)
            detail = f" ({reason})" if reason else ""
            raise GliderError(f"{where}: tensor {key!r} is neither lora_A nor lora_B of a linear layer{detail}")
        pair = halves.setdefault(match["site"], {})
        if match["which"] in pair:
            raise GliderError(f"{where}: site {match['site']} has two of lora_{match['which']}; save one adapter")
        pair[match["which"]] = key
    keys, shapes, ranks = {}, {}, {}
    for site, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise GliderError(f"{where}: site {site} has only one of lora_A and lora_B")
        a, b = tensors[pair["A"]], tensors[pair["B"]]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise GliderError(
                f"{where}: site {site} has A {list(a.shape)} and B {list(b.shape)}, which do not fit"
            )
        for half in (a, b):
            if half.dtype not in ("F32", "BF16", "F16", "F64"):
                raise GliderError(f"{where}: site {site} has dtype {half.dtype}; save it as float32 or bfloat16")
        keys[site] = (pair["A"], pair["B"])
        shapes[site] = (b.shape[0], a.shape[1])
        ranks[site] = a.shape[0]
    if not keys:
        raise GliderError(f"{where} holds no LoRA weights")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    size = sum(tensor.size for tensor in tensors.values())
    return AdapterInfo(keys, shapes, ranks, dtypes.pop() if len(dtypes) == 1 else "mixed", size)


def inspect_adapter(folder: Path) -> AdapterInfo:
    """Check the PEFT LoRA in ``folder`` by its config and the header of its weights.

    Raises:
        GliderError: whatever :func:`read_adapter` refuses but tensors that cannot be read.
    """
    read_config(folder)
    path = folder / WEIGHTS_FILE
    return pair_up(read_header(path), str(path))


def read_adapter(folder: Path) -> dict[str, SiteLora]:
    """Read every site of the PEFT LoRA in ``folder``; sites are dotted names in the base model.

    Raises:
        GliderError: a missing or broken file, an unknown tensor, a half pair, or ranks that do not match.
    """
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    info = pair_up(read_header(path), str(path))
    try:
        with safe_open(path, framework="pt") as file:
            return {
                site: SiteLora(file.get_tensor(a), file.get_tensor(b), scale_at(config, site, info.ranks[site]))
                for site, (a, b) in info.keys.items()
            }
    except (OSError, SafetensorError) as error:
        raise GliderError(f"{path} cannot be read ({error}); copy it again") from None


def check_finite(name: str, weights: Mapping[str, SiteLora]) -> None:
    """Raises GliderError if an expert holds NaN or infinity, which a layer would spread to tokens of others."""
    for site, lora in weights.items():
        for half, tensor in (("A", lora.A), ("B", lora.B)):
            # A sum is finite only if every term is; the exact check follows where the sum overflows.
            if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
                raise GliderError(
                    f"expert {name!r} has values in lora_{half} at {site} that are not finite; "
                    "train it again or remove it from the pool"
                )


def site_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """``{site: (d_out, d_in)}`` of an adapter, read from the file's header only.

    Raises:
        GliderError: if the file is missing or broken, or holds anything but pairs of A and B.
    """
    path = folder / WEIGHTS_FILE
    return pair_up(read_header(path), str(path)).shapes


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


def target_modules(sites: Iterable[str], known: Iterable[str], whole: bool = False) -> list[str]:
    """The shortest ``target_modules`` with which PEFT finds exactly ``sites`` in the base.

    Last names if they match nothing else, full names otherwise.

    Args:
        known: names of all modules of the base if ``whole``; else of the layers that experts may adapt, or none if
            they are not known either: what usual heads and poolers hold then counts as there.
    """
    wanted = set(sites)
    last = {site.rsplit(".", 1)[-1] for site in wanted}
    matched = {name for name in (*known, *(() if whole else _ON_TOP)) if name.rsplit(".", 1)[-1] in last}
    return sorted(last) if matched == wanted else sorted(wanted)


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
