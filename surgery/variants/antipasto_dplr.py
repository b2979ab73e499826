"""AntiPaSTO-DPLR: one gain per singular direction, plus a low-rank map between all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.bases.top_svd import SVD
from surgery.cores.dplr import DPLR
from surgery.factors.statistic import Pool
from surgery.variants import Variant


@dataclass(frozen=True)
class AntiPaSTODPLR(Variant):
    """Configuration of ``antipasto_dplr``.

    Attributes:
        pool: as in the basis, "rms" or "mean_abs".
        k: rank of the low-rank map.
        suppress_only: clamp the gains so that singular directions are damped and never amplified.
    """

    pool: Pool = SVD.pool
    k: int = DPLR.k
    suppress_only: bool = DPLR.suppress_only

    name: ClassVar[str] = "antipasto_dplr"
    own_basis: ClassVar[type[SVD]] = SVD
    own_core: ClassVar[type[DPLR]] = DPLR
