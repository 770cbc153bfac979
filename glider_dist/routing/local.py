"""Local scores: how well a token fits an expert, at one site. All in fp32 (fp64 for fp64 inputs).

Legend: T tokens, E experts, d width of the site's input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def normalised(x_Td: torch.Tensor) -> torch.Tensor:
    """LayerNorm without affine, eps 1e-5, of each row; ``[T, d]``."""
    x_Td = at_least_fp32(x_Td)
    return F.layer_norm(x_Td, x_Td.shape[-1:], eps=1e-5)


def gate_prototypes(gates_Ed: torch.Tensor) -> torch.Tensor:
    """``LN(v_e) / sqrt(d)`` of the raw gate vectors; ``[E, d]``."""
    return normalised(gates_Ed) / gates_Ed.shape[-1] ** 0.5


def gate_scores(normalised_Td: torch.Tensor, prototypes_Ed: torch.Tensor) -> torch.Tensor:
    """``l_e = LN(u) · LN(v_e) / sqrt(d)`` (PHATGOOSE and GLIDER, ``layers.py:361``); ``[T, E]``."""
    return normalised_Td @ prototypes_Ed.t().to(normalised_Td.dtype)


def arrow_prototypes(a_Erd: torch.Tensor, b_Eor: torch.Tensor) -> torch.Tensor:
    """The first right singular vector of each ``B_e A_e``, unit length, sign arbitrary; ``[E, d]``.

    With the QR factors ``A^T = Q R``, ``B A = (B R^T) Q^T``, so the vector is Q times the leading eigenvector of
    the r × r matrix ``R B^T B R^T``. The d_out × d_in product is never formed.
    """
    q_Edr, r_Err = torch.linalg.qr(at_least_fp32(a_Erd).transpose(1, 2))
    small_Eor = at_least_fp32(b_Eor) @ r_Err.transpose(1, 2)
    _, vectors_Err = torch.linalg.eigh(small_Eor.transpose(1, 2) @ small_Eor)
    return (q_Edr @ vectors_Err[..., -1:]).squeeze(-1)


def arrow_scores(x_Td: torch.Tensor, prototypes_Ed: torch.Tensor, temperature: float) -> torch.Tensor:
    """``|v_e · u| / temperature`` (Arrow, Ostapenko et al. 2024); ``[T, E]``."""
    x_Td = at_least_fp32(x_Td)
    return (x_Td @ prototypes_Ed.t().to(x_Td.dtype)).abs() / temperature
