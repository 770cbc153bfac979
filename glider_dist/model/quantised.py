"""A base whose linear layers keep 8 or 4 bits a weight, by bitsandbytes. Experts stay as they are."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from glider_dist.errors import GliderError

# A block of this many 4-bit weights shares one fp32 scale.
_BLOCK = 64


def quantisation(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers is to load a base: LLM.int8() (arXiv 2208.07339) or NF4 (QLoRA, arXiv 2305.14314).

    Args:
        bits: 8 or 4.
        dtype: in which the layers compute.

    Raises:
        GliderError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise GliderError(f"base_bits={bits} needs the package bitsandbytes; pip install 'glider_dist[quantised]'")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def use_plain_kernels(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU right in spite of two faults of bitsandbytes 0.50.

    Raises:
        GliderError: a layer's width is no multiple of 64, which it quantises wrongly there: an error of 0.40 of
            the weights' norm was seen at a width of 48, and of 0.09 at 576.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # After one call without gradients the layer would stay with a kernel that has no backward: a
            # validation would silently end the training of all that lies before it.
            vars(module)["support_avx512bf16_for_cpu"] = False
            if (width := vars(module)["in_features"]) % _BLOCK:
                raise GliderError(
                    f"4 bits on a CPU need widths that are multiples of {_BLOCK}, but {name} reads {width}; "
                    "use base_bits=8, over a base that is not quantised on disk"
                )


def make_plain(model: Any, dtype: torch.dtype) -> None:
    """Give a base that is quantised on disk plain linear layers, of the values that its weights stand for.

    Raises:
        GliderError: transformers cannot unpack what it is quantised by.
    """
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is None:
        return
    try:
        model.dequantize(dtype)
    except NotImplementedError:
        method = getattr(quantiser.quantization_config.quant_method, "value", "an unknown method")
        raise GliderError(
            f"the base is quantised by {method}, which cannot be undone; pass base= the model it was made from"
        ) from None


def quantised_bytes(model: nn.Module, bits: int) -> int:
    """Bytes of a base once it is quantised, from its plain layers: all linear ones but the output head."""
    whole: Any = model
    head = whole.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    small = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    }
    a_weight = 1 if bits == 8 else 0.5 + 4 / _BLOCK
    return round(sum(p.numel() * a_weight if id(p) in small else p.nbytes for p in model.parameters()))


def weight_count(model: nn.Module) -> int:
    """Weights of a base, also where a rank keeps a part of them (ZeRO 3) or two to a byte (4 bits)."""
    return sum(
        getattr(p, "ds_numel", p.numel()) * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters()
    )
