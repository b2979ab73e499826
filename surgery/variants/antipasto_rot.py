"""AntiPaSTO-Rot: turn the singular directions in small blocks, and shift the singular values.

    delta(h) = R_u^T [(S + coeff * delta_s) * (R_v h)] - S h

``R = blockdiag((I - X)^-1 (I + X))`` with ``X = coeff * A / 2`` (Cayley), ``A`` skew with ``A_ij = p/2`` above the
diagonal, softly clamped to ``a tanh(A / a)``, ``a = 2 tan(max_rotation_angle / 2)``: that bounds the angle of each
plane at ``coeff = 1``, and ``R(-coeff) = R(coeff)^-1``. Everything starts at zero, unless ``init_delta_s`` says
otherwise.

Without cancellation, with ``E = R - I = (I - X)^-1 2X`` and ``T = S E_v + coeff * delta_s (I + E_v)``, each block of
delta is one small matrix, ``D = T + E_u^T (S + T)``, so that h is turned once for all by ``tokens * r * bs`` products.

``(I - X)^-1`` needs no solve. For blocks of up to 4, with ``s = sum_{i<j} X_ij^2`` and the Pfaffian ``p`` of X,

    E = 2X ((1 + s) I + X^2) (I + X) / (1 + s + p^2)        exactly, for every coeff (Cayley and Hamilton)

and larger ones are inverted by halves: ``I - X`` has a positive definite symmetric part, so every block does.

Sources: Cayley transform (1846); block-diagonal rotations as in OFT (Qiu et al. 2023, arXiv:2306.07280).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from surgery.variants import CoreTensors, Reranked

BASES = ("V", "U", "both", "none")
GROUP = 32  # directions that are turned by one small dense matrix: wider than a block, as products of 4 are slow


@dataclass(frozen=True)
class AntiPaSTORot(Reranked):
    """Configuration of ``antipasto_rot``.

    Attributes:
        rotate_basis: which side turns: "V" (input), "U" (output), "both" or "none".
        block_size: directions per block; a site with fewer has one block.
        max_rotation_angle: bound of each plane's angle at coeff = 1, in radians, below pi.
        init_delta_s: mean and standard deviation of the initial ``delta_s``.
    """

    rotate_basis: str = "V"
    block_size: int = 4
    max_rotation_angle: float = 0.5
    init_delta_s: float = 0.0

    name: ClassVar[str] = "antipasto_rot"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("rotate_basis", BASES)
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
        sides = {"V": ("rot_v",), "U": ("rot_u",), "both": ("rot_v", "rot_u"), "none": ()}[self.rotate_basis]
        planes = size * (size - 1) // 2
        return {"delta_s": delta_s} | {side: torch.zeros(r // size, planes) for side in sides if planes}

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """``h D^T`` in blocks."""
        shift = coeff * core.delta_s
        limit = 2 * math.tan(self.max_rotation_angle / 2)
        e_v = turned(getattr(core, "rot_v", None), coeff, limit)
        e_u = turned(getattr(core, "rot_u", None), coeff, limit)
        if e_v is None and e_u is None:
            return h * shift.to(h.dtype)
        blocks = (e_v if e_v is not None else e_u).shape[-3:]  # type: ignore[union-attr]
        eye = torch.eye(blocks[-1], dtype=S.dtype, device=S.device)
        scale, shift = S.reshape(*blocks[:2], 1), shift.reshape(*shift.shape[:-1], *blocks[:2], 1)
        T = shift * eye if e_v is None else scale * e_v + shift * (eye + e_v)
        D = T if e_u is None else T + e_u.mT @ (scale * eye + T)
        return apply_blocks(h, D.to(h.dtype))


def turned(p: torch.Tensor | None, coeff: torch.Tensor, limit: float) -> torch.Tensor | None:
    """``R - I`` of the Cayley rotations of skew parameters.

    Args:
        p: (n, bs(bs-1)/2), the upper triangles by rows; None for no rotation.
        coeff: 0-d or (rows, 1, ..., 1).
        limit: of the entries of A.

    Returns:
        (n, bs, bs), or (rows, 1, ..., n, bs, bs).
    """
    if p is None:
        return None
    size = (1 + math.isqrt(1 + 8 * p.shape[1])) // 2
    X = skew(limit * torch.tanh(p / (2 * limit)), size) * (coeff / 2)[..., None, None]
    eye = torch.eye(size, dtype=p.dtype, device=p.device)
    if size > 4:
        return inverse(eye - X) @ (2 * X)
    square = X @ X
    s = -square.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] / 2
    determinant = 1 + s
    if size == 4:
        pfaffian = X[..., 0, 1] * X[..., 2, 3] - X[..., 0, 2] * X[..., 1, 3] + X[..., 0, 3] * X[..., 1, 2]
        determinant = determinant + pfaffian[..., None, None].square()
    return 2 * X @ ((1 + s) * eye + square) @ (eye + X) / determinant


def skew(entries: torch.Tensor, size: int) -> torch.Tensor:
    """Skew matrices (n, size, size) of upper triangles by rows, (n, size(size-1)/2)."""
    rows, start = [], 0
    for i in range(size - 1):
        stop = start + size - 1 - i
        rows.append(F.pad(entries[:, start:stop], (i + 1, 0)))
        start = stop
    upper = F.pad(torch.stack(rows, dim=1), (0, 0, 0, 1))
    return upper - upper.mT


def inverse(M: torch.Tensor) -> torch.Tensor:
    """Inverse of matrices (..., n, n) whose symmetric part is positive definite, by halves and Schur complements."""
    n = M.shape[-1]
    if n == 1:
        return 1 / M
    half = n // 2
    A, B, C, D = M[..., :half, :half], M[..., :half, half:], M[..., half:, :half], M[..., half:, half:]
    first = inverse(A)
    left, right = C @ first, first @ B
    second = inverse(D - left @ B)
    top = torch.cat([first + right @ second @ left, -right @ second], dim=-1)
    return torch.cat([top, torch.cat([-second @ left, second], dim=-1)], dim=-2)


def apply_blocks(h: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """``h D^T`` for a block-diagonal D.

    Args:
        h: (..., r).
        D: (n, bs, bs), or (rows, 1, ..., n, bs, bs) with one D per row of h.
    """
    n, size = D.shape[-3], D.shape[-1]
    together = max(m for m in range(1, n + 1) if n % m == 0 and (m == 1 or m * size <= GROUP))
    groups, width = n // together, together * size
    eye = torch.eye(together, dtype=D.dtype, device=D.device)
    dense = D.reshape(-1, groups, together, size, 1, size) * eye[:, None, :, None]
    dense = dense.reshape(-1, groups, width, width)
    x = h.reshape(dense.shape[0], -1, groups, width).transpose(1, 2)
    return (x @ dense.mT).transpose(1, 2).reshape(h.shape)
