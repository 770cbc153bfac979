"""One matrix product per group of rows: the only kernel the experts need.

Legend: R rows sorted by expert, E experts, i and o input and output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def grouped_product(
    x_Ri: torch.Tensor, w_Eio: torch.Tensor, ends_E: torch.Tensor, equal: bool = False
) -> torch.Tensor:
    """Apply to each group of rows its own linear map: ``y = x w_e``.

    Groups of equal size are one batched product. Others use ``torch.nn.functional.grouped_mm``: one kernel on a
    GPU, without a host sync, and a loop in C++ on a CPU. That kernel wants 16-byte aligned rows and no float64, so
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
        return F.grouped_mm(x_Ri, w_Eio, offs=ends_E)
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    # Empty groups stay in the product so that every expert is part of the graph (a zero-row gradient, not None).
    return torch.cat([x_Ri[a:b] @ w_io for a, b, w_io in zip(starts, ends, w_Eio.unbind(), strict=True)])
