"""AntiPaSTO-Arrow: the largest singular directions mix with each other, the rest have one gain each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.bases.top_svd import SVD
from surgery.cores.arrow import Arrow
from surgery.factors.statistic import Pool
from surgery.variants import Variant


@dataclass(frozen=True)
class AntiPaSTOArrow(Variant):
    """Configuration of ``antipasto_arrow``.

    Attributes:
        pool: as in the basis, "rms" or "mean_abs".
        block: number of directions that mix; all of them at a smaller site.
        suppress_only: clamp the gains of the other directions so that they are damped and never amplified.
    """

    pool: Pool = SVD.pool
    block: int = Arrow.block
    suppress_only: bool = Arrow.suppress_only

    name: ClassVar[str] = "antipasto_arrow"
    own_basis: ClassVar[type[SVD]] = SVD
    own_core: ClassVar[type[Arrow]] = Arrow
