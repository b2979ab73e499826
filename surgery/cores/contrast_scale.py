"""Contrast scale: scale each direction by how much two sets differ along it, without training.

    delta(h) = h * S * (exp(clamp(coeff * |d| * scale, -4, 4)) - 1)

``d`` is the frozen ``direction`` (r,) that the basis gives. It is linear in h, so that it merges and exports as a gain
does, and an identity at ``coeff = 0``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.cores import CoreConfig, CoreTensors

LARGEST = 4.0  # of an exponent: a direction is scaled by 0.02 to 55


@dataclass(frozen=True)
class ContrastScale(CoreConfig):
    """Configuration of ``contrast_scale``.

    Attributes:
        scale: multiplies the direction, whose norm is 1.
    """

    scale: float = 1.0

    name: ClassVar[str] = "contrast_scale"
    default_targets: ClassVar[str] = "residual-writers"
    middle_layers: ClassVar[bool] = True
    frozen: ClassVar[tuple[str, ...]] = ("direction",)
    needs: ClassVar[frozenset[str]] = frozenset({"contrast data"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.number("scale", least=0.0)

    @property
    def identity_at_init(self) -> bool:
        """It acts as soon as there is a direction."""
        return False

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``direction`` (r,): a placeholder for what the contrast gives."""
        return {"direction": torch.zeros(r)}

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """``h * S * expm1(...)``; the gain is formed before it touches h."""
        exponent = (coeff * (core.direction.abs() * self.scale)).clamp(-LARGEST, LARGEST)
        return h * (S * torch.expm1(exponent)).to(h.dtype)
