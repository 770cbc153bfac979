"""Local scores: how well a token fits an expert, at one site. All in fp32 (fp64 for fp64 inputs).

Legend: T tokens, E experts, d width of the site's input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def exact_product(a: torch.Tensor, b: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b`` (``plus`` a matrix) in their own dtype, also where ``torch.autocast`` would round both to half
    precision."""
    device = a.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return exact_product(a, b, plus)
    return a @ b if plus is None else torch.addmm(plus, a, b)


_EPS = 1e-5
_FEW = 40_000
"""Numbers of which a CPU computes a LayerNorm faster than several operations (measured: 64 rows of 576)."""


def gate_prototypes(gates_Ed: torch.Tensor) -> torch.Tensor:
    """``LN(v_e) / sqrt(d)`` of the raw gate vectors, LN without affine and with eps 1e-5; ``[E, d]``."""
    gates_Ed = at_least_fp32(gates_Ed)
    return F.layer_norm(gates_Ed, gates_Ed.shape[-1:], eps=_EPS) / gates_Ed.shape[-1] ** 0.5


class Inputs(NamedTuple):
    """What gate scores need of a site's tokens.

    Attributes:
        x_Td: ``[T, d]`` the tokens, or their LayerNorm if ``inverse_T`` is None.
        inverse_T: ``[T]`` ``1 / sqrt(var(x) + 1e-5)``, by which LayerNorm multiplies.
    """

    x_Td: torch.Tensor
    inverse_T: torch.Tensor | None

    @classmethod
    def of(cls, x_Td: torch.Tensor) -> Inputs:
        x_Td = at_least_fp32(x_Td)
        if x_Td.device.type != "cpu" or x_Td.numel() <= _FEW:
            return cls(F.layer_norm(x_Td, x_Td.shape[-1:], eps=_EPS), None)  # the fewest kernels
        # Two plain reductions, which a CPU does several times as fast as a LayerNorm.
        square_T = torch.linalg.vector_norm(x_Td, dim=-1).square() / x_Td.shape[-1]
        variance_T = (square_T - x_Td.mean(-1).square()).clamp_min(0)
        return cls(x_Td, (variance_T + _EPS).rsqrt())


def gate_scores(inputs: Inputs, prototypes_Ed: torch.Tensor, bias_TE: torch.Tensor | None = None) -> torch.Tensor:
    """``l_e = LN(u) · LN(v_e) / sqrt(d)`` (PHATGOOSE and GLIDER, ``layers.py:361``), plus ``bias_TE``; ``[T, E]``.

    The mean of u need not be subtracted: that of the prototypes is 0.
    """
    x_Td, inverse_T = inputs
    prototypes_dE = prototypes_Ed.t().to(x_Td.dtype)
    if inverse_T is None:
        return exact_product(x_Td, prototypes_dE, None if bias_TE is None else bias_TE.to(x_Td.dtype))
    scores_TE = exact_product(x_Td, prototypes_dE) * inverse_T[:, None]
    return scores_TE if bias_TE is None else scores_TE + bias_TE


def arrow_prototypes(a_Erd: torch.Tensor, b_Eor: torch.Tensor) -> torch.Tensor:
    """The first right singular vector of each ``B_e A_e``, unit length, sign arbitrary; ``[E, d]``.

    With the QR factors ``A^T = Q R``, ``B A = (B R^T) Q^T``, so the vector is Q times the leading eigenvector of
    the r × r matrix ``R B^T B R^T``. The d_out × d_in product is never formed.
    """
    q_Edr, r_Err = torch.linalg.qr(at_least_fp32(a_Erd).transpose(1, 2))
    small_Eor = exact_product(at_least_fp32(b_Eor), r_Err.transpose(1, 2))
    _, vectors_Err = torch.linalg.eigh(exact_product(small_Eor.transpose(1, 2), small_Eor))
    return exact_product(q_Edr, vectors_Err[..., -1:]).squeeze(-1)


def arrow_scores(x_Td: torch.Tensor, prototypes_Ed: torch.Tensor, temperature: float) -> torch.Tensor:
    """``|v_e · u| / temperature`` (Arrow, Ostapenko et al. 2024); ``[T, E]``."""
    x_Td = at_least_fp32(x_Td)
    return exact_product(x_Td, prototypes_Ed.t().to(x_Td.dtype)).abs() / temperature
