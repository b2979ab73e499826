"""AntiPaSTO-CorDA: gains on the directions in which the weight acts on the data, and not on its own singular ones.

    delta(h) = h * S * elu(coeff * g),        h = P x

From the second moment ``C = E[x x^T]`` of the site's input: ``U`` holds the top r eigenvectors of
``W (C + eps I) W^T``, ``S`` the square roots of their eigenvalues, and ``P = diag(1/S) U^T W`` the oblique projector
that stands for ``Vh``; so ``U diag(S) P = U U^T W``. It is ``SVD(W C^{1/2}) C^{-1/2}`` without inverting C. ``g`` (r,)
starts at zero.

Source: CorDA (Yang et al. 2024, arXiv:2406.05223), context-oriented decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.variants import CoreTensors, Oriented
from surgery.variants._gains import diagonal_gain


@dataclass(frozen=True)
class AntiPaSTOCorDA(Oriented):
    """Configuration of ``antipasto_corda``.

    Attributes:
        suppress_only: clamp the gains so that directions are damped and never amplified.
    """

    suppress_only: bool = False

    name: ClassVar[str] = "antipasto_corda"

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``g`` (r,): zeros."""
        return {"g": torch.zeros(r)}

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """``h * S * elu(coeff * g)``."""
        return h * diagonal_gain(S, core.g, coeff, suppress_only=self.suppress_only).to(h.dtype)
