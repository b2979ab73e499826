"""S-space steering: move the input along a contrast direction, as far as a gate says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.bases.contrast import ContrastDirections
from surgery.cores.gated import Gate, Gated
from surgery.variants import Variant


@dataclass(frozen=True)
class SSpace(Variant):
    """Configuration of ``sspace``.

    Attributes:
        gate: "cosine" as published, which amplifies what points along the direction already; "abs", "norm" and "none"
            steer both ways, by the sign of coeff.
        center: measure the angle from the midpoint of both means; of the gates "cosine" and "abs".
    """

    gate: Gate = "cosine"
    center: bool = False

    name: ClassVar[str] = "sspace"
    own_basis: ClassVar[type[ContrastDirections]] = ContrastDirections
    own_core: ClassVar[type[Gated]] = Gated
