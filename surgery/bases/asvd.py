"""ASVD: the directions of the weight after each input channel is scaled by its activations.

``U``, ``S`` and ``P`` are those of ``W (D + eps I) W^T`` with ``D = diag(E[x^2])``, the diagonal of the input's second
moment: ``U diag(S) P = U U^T W``. It needs d_in numbers per site where the whole moment needs d_in^2.

Source: ASVD (Yuan et al. 2023, arXiv:2312.05821), activation-aware singular value decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.bases.corda import CorDA
from surgery.factors.statistic import Kind


@dataclass(frozen=True)
class ASVD(CorDA):
    """Configuration of ``asvd``: that of ``corda``, on the diagonal of the moment."""

    name: ClassVar[str] = "asvd"

    @property
    def statistic(self) -> Kind:
        """The diagonal of the second moment."""
        return "squares"
