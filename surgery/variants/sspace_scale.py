"""S-space scaling: scale the directions along which two sets differ, without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.bases.contrast_turned import TurnedContrast
from surgery.cores.contrast_scale import ContrastScale
from surgery.variants import Variant


@dataclass(frozen=True)
class SSpaceScale(Variant):
    """Configuration of ``sspace_scale``.

    Attributes:
        scale: multiplies the direction, whose norm is 1.
    """

    scale: float = 1.0

    name: ClassVar[str] = "sspace_scale"
    own_basis: ClassVar[type[TurnedContrast]] = TurnedContrast
    own_core: ClassVar[type[ContrastScale]] = ContrastScale
