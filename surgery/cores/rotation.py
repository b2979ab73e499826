"""Rotation: turn the directions in small blocks, and shift their singular values.

    delta(h) = R_u^T [(S + coeff * delta_s) * (R_v h)] - S h

``R = blockdiag((I - X)^-1 (I + X))`` with ``X = coeff * A / 2`` (Cayley), ``A`` skew with ``A_ij = p/2`` above the
diagonal, softly clamped to ``a tanh(A / a)``, ``a = 2 tan(max_rotation_angle / 2)``: that bounds the angle of each
plane at ``coeff = 1``, and ``R(-coeff) = R(coeff)^-1``. Everything starts at zero, unless ``init_delta_s`` says
otherwise.

Without cancellation, with ``E = R - I = (I - X)^-1 2X`` and ``T = S E_v + coeff * delta_s (I + E_v)``, each block of
delta is one small matrix, ``D = T + E_u^T (S + T)``, so that h is turned once for all by ``tokens * r * bs`` products.

Sources: Cayley transform (1846); block-diagonal rotations as in OFT (Qiu et al. 2023, arXiv:2306.07280).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from surgery.cores import CoreConfig, CoreTensors
from surgery.cores._cayley import apply_blocks, block_of, blocks_together, powers, rotation_minus_identity

Sides = Literal["V", "U", "both", "none"]
SIDES: dict[Sides, tuple[str, ...]] = {"V": ("rot_v",), "U": ("rot_u",), "both": ("rot_v", "rot_u"), "none": ()}


@dataclass(frozen=True)
class Rotation(CoreConfig):
    """Configuration of ``rotation``.

    Attributes:
        rotate_basis: which side turns: "V" (input), "U" (output), "both" or "none".
        block_size: directions per block; a site with fewer has one block.
        max_rotation_angle: bound of each plane's angle at coeff = 1, in radians, below pi.
        init_delta_s: mean and standard deviation of the initial ``delta_s``.
    """

    rotate_basis: Sides = "V"
    block_size: int = 4
    max_rotation_angle: float = 0.5
    init_delta_s: float = 0.0

    name: ClassVar[str] = "rotation"
    depends_only_on_Sh: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("rotate_basis", tuple(SIDES))
        self.number("block_size", least=1, whole=True)
        self.number("max_rotation_angle", least=1e-6, most=3.14)
        self.number("init_delta_s", least=0)

    @property
    def identity_at_init(self) -> bool:
        """Unless delta_s starts elsewhere."""
        return self.init_delta_s == 0

    def rank(self, limit: int) -> int:
        """Whole blocks, or one smaller block."""
        return limit - limit % min(self.block_size, limit)

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``delta_s`` (r,); ``rot_v``, ``rot_u`` (r/bs, bs(bs-1)/2) of the sides that turn, unless blocks are of 1."""
        delta_s = self.init_delta_s * (1 + torch.randn(r, generator=generator))
        size = min(self.block_size, r)
        sides = SIDES[self.rotate_basis]
        planes = size * (size - 1) // 2
        return {"delta_s": delta_s} | {side: torch.zeros(r // size, planes) for side in sides if planes}

    def prepare(self, core: CoreTensors) -> dict[str, torch.Tensor]:
        """The powers of K and its invariants, which do not depend on coeff."""
        sides = [p for name in ("rot_v", "rot_u") if (p := getattr(core, name, None)) is not None]
        if not sides:
            return {}
        limit = 2 * math.tan(self.max_rotation_angle / 2)
        n, planes = sides[0].shape
        shape = (-1, blocks_together(n, block_of(planes)), planes)
        return powers(limit * torch.tanh(torch.cat([p.reshape(shape) for p in sides]) / (2 * limit)))

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """``h D^T`` in blocks."""
        prepared = vars(core) if getattr(core, "K", None) is not None else self.prepare(core)
        if not prepared:
            return h * (coeff * core.delta_s).to(h.dtype)
        E, c = rotation_minus_identity(prepared, coeff), coeff[..., None, None, None]
        size, count = E.shape[-1], E.shape[-3]
        groups = len(S) // (size * count)
        scale, shift = S.reshape(groups, count, size, 1), c * core.delta_s.reshape(groups, count, size, 1)
        eye = torch.eye(size, dtype=S.dtype, device=S.device)
        T = shift * eye
        if getattr(core, "rot_v", None) is not None:
            T = T + (scale + shift) * E[..., :groups, :, :, :]
        if getattr(core, "rot_u", None) is not None:
            T = T + E[..., -groups:, :, :, :].mT @ (scale * eye + T)
        return apply_blocks(h, T.to(h.dtype))
