"""Which way to compute a routed layer is the cheapest, from its sizes alone: all ways give the same sum.

* ``every``: every expert on every token, with weight 0 where it does not serve. Two plain products.
* ``each``: each row reads its own expert's A and B where they are. No gradients.
* ``sorted``: rows sorted by expert, copied, one product per expert.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from glider_dist.lora.bank import SiteBank
from glider_dist.lora.grouped import is_one_kernel

Way = Literal["every", "each", "sorted"]

_HALF = (torch.bfloat16, torch.float16)


def cheapest_way(tokens: int, places: int, x_Td: torch.Tensor, bank: SiteBank) -> Way:
    """The cheapest way for so many routed tokens with so many places each.

    Args:
        x_Td: ``[T, d]`` the input, padding included.
    """
    if x_Td.device.type != "cpu":
        return "every" if _every_on_a_gpu(tokens, places, x_Td, bank) else "sorted"
    return _on_a_cpu(tokens, places, x_Td, bank)


def _on_a_cpu(tokens: int, places: int, x_Td: torch.Tensor, bank: SiteBank) -> Way:
    experts, rank, _ = bank.A.shape
    rows, half = tokens * places, x_Td.dtype in _HALF
    if not rows or not experts:
        return "sorted"
    if half or torch.is_grad_enabled():
        # Measured with 4, 12 and 20 experts of rank 16, widths 576 and 1536: a sorted row costs about twice its
        # arithmetic, and the sorting as much as so many products of a token with a row of A and B.
        idle = tokens * rank * max(0, experts - 2 * places)
        if tokens <= 192 and experts * rank <= 320 and idle <= (20_000 if half else 5_000):
            return "every"
        return "each" if rows < experts and not torch.is_grad_enabled() else "sorted"
    width = x_Td.shape[1] + bank.B.shape[2]
    numbers = rank * width  # of an expert
    every = 30 + experts * numbers * (_READ_US + tokens * _MULTIPLY_US)
    each = 70 + rows * (1 + numbers * _READ_EACH_US)
    groups = experts * -math.expm1(-rows / experts)  # of as many rows as experts by chance
    by_sorting = (
        150 + groups * (10 + numbers * _READ_US) + rows * (0.5 + numbers * _MULTIPLY_FEW_US + width * _COPY_US)
    )
    costs: dict[Way, float] = {"every": every, "each": each, "sorted": by_sorting}
    return min(costs, key=lambda way: costs[way])


# In fp32 on one thread of an EPYC without AVX-512, in microseconds: to read a number of an expert, alone or as one
# of a row, to multiply one with a token's in large and small products, and to copy a row's there and back.
_READ_US, _READ_EACH_US, _MULTIPLY_US, _MULTIPLY_FEW_US, _COPY_US = 2.2e-4, 2.6e-4, 3.3e-5, 6e-5, 6e-4

# Measured on an H100 (bench layer): what sorting costs besides the rows' own copies, mostly the launches of some
# twenty kernels; what a group costs within one kernel and in one of its own; what dense products and copies reach.
_SORTING_S, _GROUP_S, _GROUP_ALONE_S = 4.5e-4, 1.2e-6, 2e-5
_HALF_FLOPS, _FULL_FLOPS, _BANDWIDTH = 6e14, 3e13, 2.5e12


def _every_on_a_gpu(tokens: int, places: int, x_Td: torch.Tensor, bank: SiteBank) -> bool:
    """On a GPU idle experts cost little and launches much: every expert is cheapest up to hundreds of them."""
    width, element = x_Td.shape[1], x_Td.element_size()
    columns, out = bank.A.shape[0] * bank.A.shape[1], bank.B.shape[2]
    if not columns or (torch.is_grad_enabled() and columns > places * (width + out)):
        return False  # what a backward keeps: all experts' places in rank space, or the rows' inputs and outputs
    moved = columns * (width + out) * bank.A.element_size() + 3 * tokens * columns * element
    flops = _HALF_FLOPS if x_Td.dtype in _HALF else _FULL_FLOPS
    every = 2 * tokens * columns * (width + out) / flops + moved / _BANDWIDTH
    copied = 4 * tokens * places * (width + out) * element
    if is_one_kernel(x_Td.device, x_Td.dtype):
        groups = _GROUP_S * bank.A.shape[0]
    else:
        groups = _GROUP_ALONE_S * min(bank.A.shape[0], tokens * places)
    return every <= _SORTING_S + groups + copied / _BANDWIDTH
