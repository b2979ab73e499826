"""Full: a map between all directions.

    delta(h) = coeff * (h * S) m^T

``m`` (r, r) starts at zero, so that surgery changes nothing until it is trained (the original starts it at a small
normal).

Source: Bałazy et al. 2024, LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv:2405.17604.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.cores import CoreConfig, CoreTensors
from surgery.cores._terms import steered


@dataclass(frozen=True)
class Full(CoreConfig):
    """Configuration of ``full``."""

    name: ClassVar[str] = "full"

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``m`` (r, r): zeros."""
        return {"m": torch.zeros(r, r)}

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """``h (m coeff S)^T``: coeff and S scale the columns of m, which is cheaper than to scale h."""
        return steered(h, core.m, S, coeff)
