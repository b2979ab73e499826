"""AntiPaSTO: one gain per singular direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.bases.top_svd import SVD
from surgery.cores.gain import Gain
from surgery.factors.statistic import Pool
from surgery.variants import Variant


@dataclass(frozen=True)
class AntiPaSTO(Variant):
    """Configuration of ``antipasto``.

    Attributes:
        pool: as in the basis, "rms" or "mean_abs".
        suppress_only: clamp the gains so that singular directions are damped and never amplified.
    """

    pool: Pool = SVD.pool
    suppress_only: bool = Gain.suppress_only

    name: ClassVar[str] = "antipasto"
    own_basis: ClassVar[type[SVD]] = SVD
    own_core: ClassVar[type[Gain]] = Gain
    is_default: ClassVar[bool] = True
