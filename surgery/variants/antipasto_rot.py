"""AntiPaSTO-Rot: turn the singular directions in small blocks, and shift the singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.bases.top_svd import SVD
from surgery.cores.rotation import Rotation, Sides
from surgery.factors.statistic import Pool
from surgery.variants import Variant


@dataclass(frozen=True)
class AntiPaSTORot(Variant):
    """Configuration of ``antipasto_rot``.

    Attributes:
        pool: as in the basis, "rms" or "mean_abs".
        rotate_basis: which side turns: "V" (input), "U" (output), "both" or "none".
        block_size: directions per block; a site with fewer has one block.
        max_rotation_angle: bound of each plane's angle at coeff = 1, in radians, below pi.
        init_delta_s: mean and standard deviation of the initial ``delta_s``.
    """

    pool: Pool = SVD.pool
    rotate_basis: Sides = Rotation.rotate_basis
    block_size: int = Rotation.block_size
    max_rotation_angle: float = Rotation.max_rotation_angle
    init_delta_s: float = Rotation.init_delta_s

    name: ClassVar[str] = "antipasto_rot"
    own_basis: ClassVar[type[SVD]] = SVD
    own_core: ClassVar[type[Rotation]] = Rotation
