"""LoRA-XS: a full trainable matrix between the frozen singular factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.bases.top_svd import SVD
from surgery.cores.full import Full
from surgery.factors.statistic import Pool
from surgery.variants import Variant


@dataclass(frozen=True)
class LoRAXS(Variant):
    """Configuration of ``lora_xs``.

    Attributes:
        pool: as in the basis, "rms" or "mean_abs".
    """

    pool: Pool = SVD.pool

    name: ClassVar[str] = "lora_xs"
    own_basis: ClassVar[type[SVD]] = SVD
    own_core: ClassVar[type[Full]] = Full
