"""AntiPaSTO-Ablate: project learned directions out of the output, in S-space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.bases import Basis
from surgery.bases.corda import CorDA
from surgery.bases.top_svd import SVD
from surgery.cores.ablate import Ablate
from surgery.factors.statistic import Pool
from surgery.support.configuration import shared
from surgery.variants import Variant


@dataclass(frozen=True)
class AntiPaSTOAblate(Variant):
    """Configuration of ``antipasto_ablate``.

    Attributes:
        pool: as in the basis, "rms" or "mean_abs".
        k: number of directions.
        init_alpha: initial strength of each, from 0 to 1.
        allow_amplify: let coeff leave [0, 1], so that directions may be amplified or turned around.
        cov_orient: choose the factors from the second moment of the data, as in CorDA.
        cov_eps, cov_eps_relative: as in CorDA, with ``cov_orient``.
    """

    pool: Pool = SVD.pool
    k: int = Ablate.k
    init_alpha: float = Ablate.init_alpha
    allow_amplify: bool = Ablate.allow_amplify
    cov_orient: bool = False
    cov_eps: float = CorDA.cov_eps
    cov_eps_relative: bool = CorDA.cov_eps_relative

    name: ClassVar[str] = "antipasto_ablate"
    own_basis: ClassVar[type[SVD]] = SVD
    own_core: ClassVar[type[Ablate]] = Ablate

    def __post_init__(self) -> None:
        super().__post_init__()
        shared(CorDA, self)  # refuses wrong values without cov_orient too

    def default_basis(self) -> type[Basis]:
        """The second moment's, where it orients the factors."""
        return CorDA if self.cov_orient else SVD
