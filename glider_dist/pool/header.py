"""The header of a safetensors file, read without opening the tensors: an 8-byte length, then JSON.

Thousands of adapters are listed and checked this way. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glider_dist.errors import GliderError

_LARGEST = 100_000_000  # bytes of JSON; the safetensors library refuses more, too
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor: ``dtype`` as safetensors writes it (``BF16``), shape, size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int


def info_of(tensor: torch.Tensor) -> TensorInfo:
    """The same of a tensor in memory; a dtype that adapters do not have keeps torch's name."""
    dtype = _NAMES.get(tensor.dtype, str(tensor.dtype))
    return TensorInfo(dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of the tensors in a safetensors file.

    Raises:
        GliderError: the file is missing, cut off, or no safetensors file.
    """
    try:
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if start == b"version " and total < 1024:
                raise ValueError("it is the pointer that Git LFS keeps in place of a file; run git lfs pull")
            length = int.from_bytes(start, "little")
            if total < 8 or length > min(total - 8, _LARGEST):
                raise ValueError("it is cut off, or no safetensors file")
            header = json.loads(file.read(length))
        return _tensors(header, total - 8 - length)
    except FileNotFoundError:
        raise GliderError(f"{path} does not exist; an adapter's weights must be safetensors") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise GliderError(f"{path} cannot be read ({error}); copy it again") from None


def _tensors(header: dict[str, Any], data: int) -> dict[str, TensorInfo]:
    found = {}
    size = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = tuple(int(length) for length in entry["shape"])
        start, end = entry["data_offsets"]
        width = _BYTES.get(entry["dtype"])
        if not 0 <= start <= end <= data or (width and end - start != width * math.prod(shape)):
            raise ValueError(f"tensor {name!r} does not lie within the file")
        size += end - start
        found[name] = TensorInfo(entry["dtype"], shape, end - start)
    if size != data:
        raise ValueError(f"its header speaks of {size} bytes of tensors, the file holds {data}")
    return found
