"""Singular directions of the weight: the r largest, or with calibration data those that carry most of it.

With data these are the r directions of the largest ``S_i * pool_n |x_n . v_i|``, in descending order of S.

Source: PiSSA's split (Meng et al. 2024, arXiv:2404.02948).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.bases import Basis, Property
from surgery.factors.statistic import POOLS, Kind, Pool, Statistic, reranked
from surgery.factors.svd import METHODS, Factorisation, Method, factorise


@dataclass(frozen=True)
class SVD(Basis):
    """Configuration of ``svd``.

    Attributes:
        svd_method: "exact", "randomised" (where the rank is small and the spectrum not too wide for it, else exact), or
            "auto" (randomised for large weights and small ranks only); with data always exact.
        pool: "rms" or "mean_abs", over the tokens n of the data.
    """

    svd_method: Method = "auto"
    pool: Pool = "rms"

    name: ClassVar[str] = "svd"
    gives: ClassVar[frozenset[Property]] = frozenset({"orthonormal U", "orthonormal Vh"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("svd_method", METHODS)
        self.one_of("pool", tuple(POOLS))

    @property
    def statistic(self) -> Kind:
        """The second moment gives the rms of every projection; the mean absolute value needs the projections."""
        return POOLS[self.pool]

    def factorise(self, weight: torch.Tensor, r: int, statistic: Statistic | None, seed: int) -> Factorisation:
        """The top triples, or those that a statistic ranks highest."""
        if statistic is None:
            return factorise(weight, r, self.svd_method, seed)
        return reranked(weight, r, statistic)
