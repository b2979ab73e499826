"""Cosine: move the input along a contrast direction as far as it already points there.

    delta(h) = coeff * cos(sqrt(S) h, d) * sqrt(S) d,        0 where h = 0

The cosine is signed. ``d`` is the frozen ``direction`` (r,) that the basis gives. Nothing is trained. It is an identity
at ``coeff = 0`` only, and it is not linear in h: there is no weight of the same effect, so it can neither be merged nor
become a LoRA.

Sources: contrastive activation addition (Rimsky et al. 2024, arXiv:2312.06681); representation engineering (Zou et al.
2023, arXiv:2310.01405); here in the singular basis of the weight, with S halved between input and output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.cores import CoreConfig, CoreTensors


@dataclass(frozen=True)
class Cosine(CoreConfig):
    """Configuration of ``cosine``."""

    name: ClassVar[str] = "cosine"
    linear: ClassVar[bool] = False
    depends_only_on_Sh: ClassVar[bool] = False
    default_targets: ClassVar[str] = "residual-writers"
    frozen: ClassVar[tuple[str, ...]] = ("direction",)
    needs: ClassVar[frozenset[str]] = frozenset({"contrast data"})

    @property
    def identity_at_init(self) -> bool:
        """It acts as soon as there is a direction."""
        return False

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``direction`` (r,): a placeholder for what the contrast gives."""
        return {"direction": torch.zeros(r)}

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """The gated direction, in the dtype of S; vectors are scaled by their largest entry, which a cosine does not
        notice."""
        root = S.sqrt()
        a = _scaled(_scaled(h.to(S.dtype)) * root)
        squares = a.square().sum(dim=-1, keepdim=True)
        cosine = (a * core.direction).sum(dim=-1, keepdim=True) * torch.where(squares > 0, squares, 1.0).rsqrt()
        return (coeff * cosine * (root * core.direction)).to(h.dtype)


def _scaled(a: torch.Tensor) -> torch.Tensor:
    """Rows over their largest entry, so that no square overflows or vanishes; a row of zeros stays."""
    largest = a.abs().amax(dim=-1, keepdim=True)
    return a / torch.where(largest > 0, largest, 1.0)
