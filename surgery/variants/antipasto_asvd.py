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

from surgery.gain import diagonal_gain
from surgery.oriented import oriented
from surgery.statistics import Statistic, required
from surgery.svd import Factorisation
from surgery.variants import CoreTensors, Variant


@dataclass(frozen=True)
class AntiPaSTOASVD(Variant):
    """Configuration of ``antipasto_asvd``.

    Attributes:
        cov_eps: added to the second moment of each channel.
        cov_eps_relative: take ``cov_eps`` as a share of their mean.
        suppress_only: clamp the gains so that directions are damped and never amplified.
    """

    cov_eps: float = 1e-3
    cov_eps_relative: bool = False
    suppress_only: bool = False

    name: ClassVar[str] = "antipasto_asvd"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.number("cov_eps", least=0)

    @property
    def statistic(self) -> str:
        """The diagonal of the second moment."""
        return "squares"

    @property
    def needs_calibration(self) -> bool:
        """There is no D without data."""
        return True

    def factorise(self, weight: torch.Tensor, r: int, statistic: Statistic | None, seed: int) -> Factorisation:
        """``U``, ``S`` and ``P`` from the mean squares of the channels."""
        return oriented(weight, r, required(statistic), self.cov_eps, relative=self.cov_eps_relative)

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``g`` (r,): zeros."""
        return {"g": torch.zeros(r)}

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """``h * S * elu(coeff * g)``."""
        return h * diagonal_gain(S, core.g, coeff, suppress_only=self.suppress_only).to(h.dtype)
