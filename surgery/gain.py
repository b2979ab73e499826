"""One gain per direction, ``S * elu(coeff * g)``: the diagonal core that several variants share."""

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
