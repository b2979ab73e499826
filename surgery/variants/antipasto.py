"""AntiPaSTO: one gain per singular direction.

    delta(h) = h * S * elu(coeff * g)        so that   S_eff = S * (1 + elu(coeff * g)) > 0

``g`` (r,) starts at zero, where ``elu`` and with it delta is an exact zero.

Sources: PiSSA's split (Meng et al. 2024, arXiv:2404.02948) for the frozen factors; SVFT and Transformer-squared's SVF
(Sun et al. 2025, arXiv:2501.06252) for gains on singular values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.variants import CoreTensors, Reranked
from surgery.variants._gains import diagonal_gain


@dataclass(frozen=True)
class AntiPaSTO(Reranked):
    """Configuration of ``antipasto``.

    Attributes:
        suppress_only: clamp the gains so that singular directions are damped and never amplified.
    """

    suppress_only: bool = False

    name: ClassVar[str] = "antipasto"
    is_default: ClassVar[bool] = True

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``g`` (r,): zeros."""
        return {"g": torch.zeros(r)}

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """``h * S * elu(coeff * g)``."""
        return h * diagonal_gain(S, core.g, coeff, suppress_only=self.suppress_only).to(h.dtype)
