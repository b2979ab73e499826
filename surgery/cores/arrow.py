"""Arrow: the largest directions mix with each other, the rest have one gain each.

    delta(h) = [coeff * (S h)_{:b} m^T,  (S h)_{b:} * elu(coeff * g)]

``m`` (b, b) and ``g`` (r - b,) start at zero; a site of at most ``b`` directions has no ``g``. ``suppress_only`` clamps
``g`` and leaves the block alone.

Sources: LoRA-XS (Bałazy et al. 2024, arXiv:2405.17604) for a full core between frozen factors, here of the top b only;
gains as in SVF (Sun et al. 2025, arXiv:2501.06252).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.cores import CoreConfig, CoreTensors
from surgery.cores._terms import diagonal_gain, steered


@dataclass(frozen=True)
class Arrow(CoreConfig):
    """Configuration of ``arrow``.

    Attributes:
        block: number of directions that mix; all of them at a smaller site.
        suppress_only: clamp the gains of the other directions so that they are damped and never amplified.
    """

    block: int = 8
    suppress_only: bool = False

    name: ClassVar[str] = "arrow"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.number("block", least=1, whole=True)

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``m`` (b, b) and, where there are more directions, ``g`` (r - b,): zeros."""
        b = min(self.block, r)
        return {"m": torch.zeros(b, b)} | ({"g": torch.zeros(r - b)} if r > b else {})

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """The block's product beside the gains."""
        b, r = core.m.shape[0], S.shape[0]
        mixed = steered(h[..., :b], core.m, S[:b], coeff)
        if r == b:
            return mixed
        gain = diagonal_gain(S[b:], core.g, coeff, suppress_only=self.suppress_only)
        return torch.cat([mixed, h[..., b:] * gain.to(h.dtype)], dim=-1)
