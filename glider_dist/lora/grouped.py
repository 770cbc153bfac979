"""One matrix product per group of rows: the only kernel the experts need.

Legend: R rows sorted by expert, E experts, i and o input and output width.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

_MOST_GROUPS = 1023
"""In one call of CUDA's kernel (aten/src/ATen/native/cuda/GroupedBlas.cpp refuses more)."""


def grouped_product(
    x_Ri: torch.Tensor, w_Eio: torch.Tensor, ends_E: torch.Tensor, equal: bool = False
) -> torch.Tensor:
    """Apply to each group of rows its own linear map: ``y = x w_e``.

    Groups of equal size are one batched product. Others use ``torch.nn.functional.grouped_mm``: one kernel without
    a host sync where :func:`is_one_kernel` (for more than 1,023 groups several, and one sync), else a copy of
    ``ends_E`` to the host and a product for each group in C++. It wants 16-byte aligned rows and no float64, so
    other inputs take a loop over the groups.

    Args:
        x_Ri: ``[R, i]`` rows, sorted by group.
        w_Eio: ``[E, i, o]`` one matrix per group (either of the last two may be contiguous), dtype of ``x_Ri``.
        ends_E: ``[E]`` int32, where each group ends; the last entry must be R.
        equal: whether all groups have R / E rows.

    Returns:
        ``[R, o]`` in the dtype of ``x_Ri``.
    """
    if not x_Ri.shape[0]:
        # A product of no rows, so that the stacked parameter stays in the graph (a gradient of zeros, not None).
        return x_Ri @ (w_Eio[0] if len(w_Eio) else w_Eio.sum(0))
    if equal:
        return torch.bmm(x_Ri.view(len(w_Eio), -1, x_Ri.shape[1]), w_Eio).flatten(0, 1)
    aligned = all(width * x_Ri.element_size() % 16 == 0 for width in w_Eio.shape[1:])
    if aligned and x_Ri.dtype in (torch.float32, torch.bfloat16, torch.float16):
        # What is planned on the meta device has no numbers to split at.
        if len(w_Eio) > _MOST_GROUPS and not x_Ri.is_meta:
            return _in_parts(x_Ri, w_Eio, ends_E)
        return F.grouped_mm(x_Ri, w_Eio, offs=ends_E)
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    # Empty groups stay in the product so that every expert is part of the graph (a zero-row gradient, not None).
    return torch.cat([x_Ri[a:b] @ w_io for a, b, w_io in zip(starts, ends, w_Eio.unbind(), strict=True)])


def _in_parts(x_Ri: torch.Tensor, w_Eio: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    parts, row = [], 0
    last_rows = ends_E[_MOST_GROUPS - 1 :: _MOST_GROUPS].tolist()
    for place, w_eio in enumerate(w_Eio.split(_MOST_GROUPS)):
        ends_e = ends_E[place * _MOST_GROUPS :][: len(w_eio)]
        end = last_rows[place] if place < len(last_rows) else x_Ri.shape[0]
        parts.append(grouped_product(x_Ri[row:end], w_eio, ends_e - row))
        row = end
    return torch.cat(parts)


def is_one_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a grouped product on this device is one kernel, to which groups without rows cost next to nothing.

    On CUDA that is bfloat16 on compute capability 9.0 and 10.0.
    """
    if device.type != "cuda":
        return device.type != "cpu"
    return dtype == torch.bfloat16 and _major(device) in (9, 10)


@cache
def _major(device: torch.device) -> int:
    return int(torch.cuda.get_device_capability(device)[0])
