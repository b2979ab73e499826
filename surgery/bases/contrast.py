"""Contrast: the singular directions of the weight along which two sets of inputs differ most.

These are the r directions with the largest ``|dS|``, ``dS = mean(sqrt(S) h+) - mean(sqrt(S) h-)``, in descending order
of S, and ``direction = dS / |dS|`` among them.

Sources: contrastive activation addition (Rimsky et al. 2024, arXiv:2312.06681); representation engineering (Zou et al.
2023, arXiv:2310.01405); here in the singular basis of the weight, with S halved between input and output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.bases import Basis, Property
from surgery.factors.statistic import Kind, Statistic, contrasted, required
from surgery.factors.svd import Factorisation


@dataclass(frozen=True)
class ContrastDirections(Basis):
    """Configuration of ``contrast``."""

    name: ClassVar[str] = "contrast"
    gives: ClassVar[frozenset[Property]] = frozenset({"orthonormal U", "orthonormal Vh", "contrast data"})

    @property
    def statistic(self) -> Kind:
        """The mean inputs of two sets."""
        return "contrast"

    @property
    def needs_calibration(self) -> bool:
        """There is no direction without a contrast."""
        return True

    def factorise(self, weight: torch.Tensor, r: int, statistic: Statistic | None, seed: int) -> Factorisation:
        """The singular directions along which the two sets differ most, and the direction among them."""
        return contrasted(weight, r, required(statistic))
