"""AntiPaSTO-ASVD: gains on the directions of the weight after each input channel is scaled by its activations.

    delta(h) = h * S * elu(coeff * g),        h = P x

``U``, ``S`` and ``P`` are those of ``W (D + eps I) W^T`` with ``D = diag(E[x^2])``, the diagonal of the input's second
moment: ``U diag(S) P = U U^T W``. It needs d_in numbers per site where the whole moment needs d_in^2. ``g`` (r,) starts
at zero.

Source: ASVD (Yuan et al. 2023, arXiv:2312.05821), activation-aware singular value decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.variants import CoreTensors, Oriented
from surgery.variants._gains import diagonal_gain


@dataclass(frozen=True)
class AntiPaSTOASVD(Oriented):
    """Configuration of ``antipasto_asvd``.

    Attributes:
        suppress_only: clamp the gains so that directions are damped and never amplified.
    """

    suppress_only: bool = False

    name: ClassVar[str] = "antipasto_asvd"

    @property
    def statistic(self) -> str:
        """The diagonal of the second moment."""
        return "squares"

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``g`` (r,): zeros."""
        return {"g": torch.zeros(r)}

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """``h * S * elu(coeff * g)``."""
        return h * diagonal_gain(S, core.g, coeff, suppress_only=self.suppress_only).to(h.dtype)
