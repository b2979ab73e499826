"""Ablate: project learned directions out of the output, in S-space.

    delta(h) = -coeff * ((S h) C * clamp(alpha, 0, 1)) C^T,        C = Q of the reduced QR of c

The core matrix ``I - coeff C diag(alpha) C^T`` is a contraction, its eigenvalues in [0, 1]: ``coeff`` is clamped to
[0, 1] in delta as well, unless ``allow_amplify``. ``c`` (r, k) starts normal, with standard deviation 1/sqrt(r), and
``alpha`` (k,) small and positive, so that ``c`` gets a gradient at step 0: it is an identity at ``coeff = 0``, not at
init. What is a contraction in S-space is one of the output only where U is orthonormal.

C is made by Gram and Schmidt in blocks (columns halved and halved again), each projection done twice: matrix products
only, so that no QR reaches a graph. A column that depends on those before it gives a zero column.

Sources: directional ablation (Arditi et al. 2024, arXiv:2406.11717); "twice is enough" (Giraud et al. 2005).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from surgery.cores import CoreConfig, CoreTensors


@dataclass(frozen=True)
class Ablate(CoreConfig):
    """Configuration of ``ablate``.

    Attributes:
        k: number of directions.
        init_alpha: initial strength of each, from 0 to 1.
        allow_amplify: let coeff leave [0, 1], so that directions may be amplified or turned around.
    """

    k: int = 1
    init_alpha: float = 0.05
    allow_amplify: bool = False

    name: ClassVar[str] = "ablate"
    default_targets: ClassVar[str] = "residual-writers"
    needs: ClassVar[frozenset[str]] = frozenset({"orthonormal U"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.number("k", least=1, whole=True)
        self.number("init_alpha", least=0, most=1)

    @property
    def identity_at_init(self) -> bool:
        """Only where alpha starts at zero."""
        return self.init_alpha == 0

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``c`` (r, k): normal of standard deviation 1/sqrt(r); ``alpha`` (k,): ``init_alpha``."""
        k = min(self.k, r)
        return {"c": torch.randn(r, k, generator=generator) / r**0.5, "alpha": torch.full((k,), float(self.init_alpha))}

    def prepare(self, core: CoreTensors) -> dict[str, torch.Tensor]:
        """The orthonormal basis of the directions, which only depends on the core."""
        return {"basis": orthonormal(core.c)}

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """Project on the directions, scale, and go back: two products of width k."""
        basis = getattr(core, "basis", None)
        basis = orthonormal(core.c) if basis is None else basis
        strength = -(coeff if self.allow_amplify else coeff.clamp(0, 1))
        along = F.linear(h * strength.to(h.dtype), (core.alpha.clamp(0, 1)[:, None] * basis.T * S).to(h.dtype))
        return F.linear(along, basis.to(h.dtype))


def orthonormal(c: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span those of ``c`` (r, k), in column order; zero for a dependent column."""
    largest = c.detach().abs().amax(dim=0)  # whose square may be out of range; the result has no scale
    c = c / torch.where(largest > 0, largest, 1.0)
    norms = torch.linalg.vector_norm(c, dim=0)
    return _gram_schmidt(c / torch.where(norms > 0, norms, 1.0))


def _gram_schmidt(c: torch.Tensor) -> torch.Tensor:
    k = c.shape[1]
    if k == 1:
        norm = torch.linalg.vector_norm(c)
        independent = norm > 32 * torch.finfo(c.dtype).eps  # of a column that had norm 1
        return c * torch.where(independent, 1.0 / torch.where(independent, norm, 1.0), 0.0)
    first = _gram_schmidt(c[:, : k // 2])
    rest = c[:, k // 2 :]
    for _ in range(2):
        rest = rest - first @ (first.T @ rest)
    return torch.cat([first, _gram_schmidt(rest)], dim=1)
