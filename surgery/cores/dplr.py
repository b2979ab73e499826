"""DPLR, diagonal plus low rank: one gain per direction, and a low-rank map between all of them.

    delta(h) = h * S * elu(coeff * g)  +  coeff * (h a^T) b^T

``g`` (r,) and ``b`` (r, k) start at zero, ``a`` (k, r) as in LoRA (uniform in ±1/sqrt(r)), so that delta starts at zero
and ``b`` gets a gradient at once. ``suppress_only`` clamps ``g`` only.

Sources: diagonal plus low rank as in S4 (Gu et al. 2022, arXiv:2111.00396); LoRA (Hu et al. 2021, arXiv:2106.09685).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from surgery.cores import CoreConfig, CoreTensors
from surgery.cores._terms import diagonal_gain, saturated, steered


@dataclass(frozen=True)
class DPLR(CoreConfig):
    """Configuration of ``dplr``.

    Attributes:
        k: rank of the low-rank map.
        suppress_only: clamp the gains so that directions are damped and never amplified.
    """

    k: int = 8
    suppress_only: bool = False

    name: ClassVar[str] = "dplr"
    depends_only_on_Sh: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.number("k", least=1, most=2**16, whole=True)

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``g`` (r,) and ``b`` (r, k): zeros; ``a`` (k, r): Kaiming-uniform with a = sqrt(5)."""
        a = (2 * torch.rand(self.k, r, generator=generator) - 1) / r**0.5
        return {"g": torch.zeros(r), "a": a, "b": torch.zeros(r, self.k)}

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """The gains' product plus the low-rank one."""
        diagonal = h * diagonal_gain(S, core.g, coeff, suppress_only=self.suppress_only).to(h.dtype)
        inner = steered(h, core.a, torch.ones_like(S), coeff)
        b = saturated(core.b, h.dtype)
        if coeff.dim() == 0:  # at coefficient 0, what overflows on the way back does not reach a either
            b = torch.where(coeff == 0, torch.zeros_like(b), b)
        return diagonal + F.linear(inner, b)
