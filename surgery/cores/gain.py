"""Gain: one factor per direction.

    delta(h) = h * S * elu(coeff * g)        so that   S_eff = S * (1 + elu(coeff * g)) > 0

``g`` (r,) starts at zero, where ``elu`` and with it delta is an exact zero.

Sources: SVFT (Lingam et al. 2024, arXiv:2405.19597) and Transformer-squared's SVF (Sun et al. 2025, arXiv:2501.06252)
for gains on singular values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.cores import CoreConfig, CoreTensors
from surgery.cores._terms import diagonal_gain


@dataclass(frozen=True)
class Gain(CoreConfig):
    """Configuration of ``gain``.

    Attributes:
        suppress_only: clamp the gains so that directions are damped and never amplified.
    """

    suppress_only: bool = False

    name: ClassVar[str] = "gain"

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``g`` (r,): zeros."""
        return {"g": torch.zeros(r)}

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """``h * S * elu(coeff * g)``."""
        return h * diagonal_gain(S, core.g, coeff, suppress_only=self.suppress_only).to(h.dtype)
