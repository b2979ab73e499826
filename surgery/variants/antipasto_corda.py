"""AntiPaSTO-CorDA: gains on the directions in which the weight acts on the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.bases.corda import CorDA
from surgery.cores.gain import Gain
from surgery.variants import Variant


@dataclass(frozen=True)
class AntiPaSTOCorDA(Variant):
    """Configuration of ``antipasto_corda``.

    Attributes:
        cov_eps, cov_eps_relative: as in the basis.
        suppress_only: clamp the gains so that directions are damped and never amplified.
    """

    cov_eps: float = CorDA.cov_eps
    cov_eps_relative: bool = CorDA.cov_eps_relative
    suppress_only: bool = Gain.suppress_only

    name: ClassVar[str] = "antipasto_corda"
    own_basis: ClassVar[type[CorDA]] = CorDA
    own_core: ClassVar[type[Gain]] = Gain
