"""CorDA: the directions in which the weight acts on the data, and not its own singular ones.

From the second moment ``C = E[x x^T]`` of the site's input: ``U`` holds the top r eigenvectors of
``W (C + eps I) W^T``, ``S`` the square roots of their eigenvalues, and ``P = diag(1/S) U^T W`` the oblique projector
that stands for ``Vh``; so ``U diag(S) P = U U^T W``. It is ``SVD(W C^{1/2}) C^{-1/2}`` without inverting C.

Source: CorDA (Yang et al. 2024, arXiv:2406.05223), context-oriented decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.bases import Basis
from surgery.factors.oriented_svd import oriented
from surgery.factors.statistic import Statistic, required
from surgery.factors.svd import Factorisation


@dataclass(frozen=True)
class CorDA(Basis):
    """Configuration of ``corda``.

    Attributes:
        cov_eps: added to the diagonal of the second moment.
        cov_eps_relative: take ``cov_eps`` as a share of the mean of that diagonal.
    """

    cov_eps: float = 1e-3
    cov_eps_relative: bool = False

    name: ClassVar[str] = "corda"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.number("cov_eps", least=0)

    @property
    def needs_calibration(self) -> bool:
        """There is no moment without data."""
        return True

    def factorise(self, weight: torch.Tensor, r: int, statistic: Statistic | None, seed: int) -> Factorisation:
        """``U``, ``S`` and the oblique projector ``P`` in the place of ``Vh``."""
        return oriented(weight, r, required(statistic), self.cov_eps, relative=self.cov_eps_relative)
