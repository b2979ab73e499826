"""AntiPaSTO-ASVD: gains on the directions of the weight after each input channel is scaled by its activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.bases.asvd import ASVD
from surgery.cores.gain import Gain
from surgery.variants import Variant


@dataclass(frozen=True)
class AntiPaSTOASVD(Variant):
    """Configuration of ``antipasto_asvd``.

    Attributes:
        cov_eps, cov_eps_relative: as in the basis.
        suppress_only: clamp the gains so that directions are damped and never amplified.
    """

    cov_eps: float = ASVD.cov_eps
    cov_eps_relative: bool = ASVD.cov_eps_relative
    suppress_only: bool = Gain.suppress_only

    name: ClassVar[str] = "antipasto_asvd"
    own_basis: ClassVar[type[ASVD]] = ASVD
    own_core: ClassVar[type[Gain]] = Gain
