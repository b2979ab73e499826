"""LoRA-XS: a full trainable matrix between the frozen singular factors.

    delta(h) = coeff * (h * S) m^T

``m`` (r, r) starts at zero, so that surgery changes nothing until it is trained (the original starts it at a small
normal).

Source: Bałazy et al. 2024, LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv:2405.17604.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.variants import CoreTensors, Reranked
from surgery.variants._gains import steered


@dataclass(frozen=True)
class LoRAXS(Reranked):
    """Configuration of ``lora_xs``."""

    name: ClassVar[str] = "lora_xs"

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``m`` (r, r): zeros."""
        return {"m": torch.zeros(r, r)}

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """``h (m coeff S)^T``: coeff and S scale the columns of m, which is cheaper than to scale h."""
        return steered(h, core.m, S, coeff)
