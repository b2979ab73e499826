"""S-space steering: move the input along a contrast direction as far as it already points there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.bases.contrast import ContrastDirections
from surgery.cores.cosine import Cosine
from surgery.variants import Variant


@dataclass(frozen=True)
class SSpace(Variant):
    """Configuration of ``sspace``."""

    name: ClassVar[str] = "sspace"
    own_basis: ClassVar[type[ContrastDirections]] = ContrastDirections
    own_core: ClassVar[type[Cosine]] = Cosine
