"""Terms that several cores are made of: a gain per direction, ``S * elu(coeff * g)``, and maps that coeff scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def diagonal_gain(S: torch.Tensor, g: torch.Tensor, coeff: torch.Tensor, *, suppress_only: bool) -> torch.Tensor:
    """``S * elu(coeff * g)``, so that ``S_eff = S (1 + elu(coeff * g)) > 0``; an exact zero at ``coeff * g = 0``.

    Args:
        S, g: (r,).
        coeff: 0-d, or with one value per row.
        suppress_only: clamp ``g`` to at most 0, so that nothing is amplified for ``coeff >= 0``. (``clamp(max=0)``
            passes the whole gradient at ``g = 0``, where ``minimum`` would pass half.)

    Returns:
        The gain in the dtype of ``g``. Formed before it touches h: an overflowing h then never meets a zero.
    """
    return S * F.elu(coeff * (g.clamp(max=0) if suppress_only else g))


def steered(h: torch.Tensor, m: torch.Tensor, S: torch.Tensor, coeff: torch.Tensor) -> torch.Tensor:
    """``coeff * (h * S) m^T``; an exact zero at ``coeff = 0``, even where ``m`` overflows the dtype of h.

    Args:
        h: (..., n).
        m: (q, n), in the dtype of S; S: (n,).
        coeff: 0-d, which scales the map, or with one value per row, which scales h.
    """
    if coeff.dim() == 0:
        return F.linear(h, (m * (coeff * S)).to(h.dtype))
    return F.linear(h * coeff.to(h.dtype), saturated(m * S, h.dtype))


def saturated(m: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A map in a dtype, whose largest number stands for what overflows it: zero times that is still zero."""
    limit = torch.finfo(dtype).max
    return m.clamp(-limit, limit).to(dtype)
