"""Contrast, turned: as ``contrast``, with the signs of each ``(u_i, v_i)`` such that the direction is not negative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.bases.contrast import ContrastDirections
from surgery.factors.statistic import Statistic
from surgery.factors.svd import Factorisation


@dataclass(frozen=True)
class TurnedContrast(ContrastDirections):
    """Configuration of ``contrast_turned``."""

    name: ClassVar[str] = "contrast_turned"

    def factorise(self, weight: torch.Tensor, r: int, statistic: Statistic | None, seed: int) -> Factorisation:
        """The directions of ``contrast``, each pointing from the negative set to the positive one."""
        found = super().factorise(weight, r, statistic, seed)
        signs = torch.where(found.core["direction"] < 0, -1.0, 1.0).to(found.U.dtype)
        turned = {name: tensor * signs for name, tensor in found.core.items()}
        return found._replace(U=found.U * signs, Vh=found.Vh * signs[:, None], core=turned)
