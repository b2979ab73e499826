"""AntiPaSTO-Rot: turn the singular directions in small blocks, and shift the singular values.

    delta(h) = R_u^T [(S + coeff * delta_s) * (R_v h)] - S h

``R = blockdiag((I - X)^-1 (I + X))`` with ``X = coeff * A / 2`` (Cayley), ``A`` skew with ``A_ij = p/2`` above the
diagonal, softly clamped to ``a tanh(A / a)``, ``a = 2 tan(max_rotation_angle / 2)``: that bounds the angle of each
plane at ``coeff = 1``, and ``R(-coeff) = R(coeff)^-1``. Everything starts at zero, unless ``init_delta_s`` says
otherwise.

Without cancellation, with ``E = R - I = (I - X)^-1 2X`` and ``T = S E_v + coeff * delta_s (I + E_v)``, each block of
delta is one small matrix, ``D = T + E_u^T (S + T)``, so that h is turned once for all by ``tokens * r * bs`` products.

``(I - X)^-1`` needs no solve. With ``X = c K``, ``c = coeff / 2``, and for blocks of up to 4, by Cayley and Hamilton,

    E = 2c (K + c K^2 + c^2 p K* - c^3 p^2 I) / (1 + c^2 (s + c^2 p^2))        exactly, for every coeff

with ``s = sum_{i<j} K_ij^2``, the Pfaffian ``p`` of K (0 for blocks of 2 and 3), and the dual ``K*`` of K, for which
``p K* = s K + K^3`` without the cancellation. Larger blocks are inverted by halves: ``I - X`` has a positive definite
symmetric part, so every Schur complement has one too.

Sources: Cayley transform (1846); block-diagonal rotations as in OFT (Qiu et al. 2023, arXiv:2306.07280).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    of_scaled: ClassVar[bool] = False

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

    def prepare(self, core: CoreTensors) -> dict[str, torch.Tensor]:
        """The powers of K and its invariants, which do not depend on coeff."""
        sides = [p for name in ("rot_v", "rot_u") if (p := getattr(core, name, None)) is not None]
        if not sides:
            return {}
        limit = 2 * math.tan(self.max_rotation_angle / 2)
        n, planes = sides[0].shape
        shape = (-1, together(n, block_of(planes)), planes)
        return powers(limit * torch.tanh(torch.cat([p.reshape(shape) for p in sides]) / (2 * limit)))

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """``h D^T`` in blocks."""
        kept = vars(core) if getattr(core, "K", None) is not None else self.prepare(core)
        if not kept:
            return h * (coeff * core.delta_s).to(h.dtype)
        E, knob = turned(kept, coeff), coeff[..., None, None, None]
        size, count = E.shape[-1], E.shape[-3]
        groups = len(S) // (size * count)
        scale, shift = S.reshape(groups, count, size, 1), knob * core.delta_s.reshape(groups, count, size, 1)
        eye = torch.eye(size, dtype=S.dtype, device=S.device)
        T = shift * eye
        if getattr(core, "rot_v", None) is not None:
            T = T + (scale + shift) * E[..., :groups, :, :, :]
        if getattr(core, "rot_u", None) is not None:
            T = T + E[..., -groups:, :, :, :].mT @ (scale * eye + T)
        return apply_blocks(h, T.to(h.dtype))


def block_of(planes: int) -> int:
    """Size of a block of so many planes."""
    return (1 + math.isqrt(1 + 8 * planes)) // 2


def together(n: int, size: int) -> int:
    """How many of n blocks are applied as one small dense matrix."""
    return max(m for m in range(1, n + 1) if n % m == 0 and (m == 1 or m * size <= GROUP))


def powers(entries: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the Cayley transform of skew matrices needs, apart from coeff.

    Args:
        entries: (..., size(size-1)/2), the upper triangles by rows.
    """
    size = block_of(entries.shape[-1])
    K = skew(entries, size)
    if size > 4:
        return {"K": K}
    kept = {"K": K, "K2": K @ K, "s": entries.square().sum(dim=-1)[..., None, None]}
    if size == 4:
        f, e, d, c, b, a = (entries[..., i] for i in range(6))
        dual = torch.stack([a, -b, c, d, -e, f], dim=-1)
        pfaffian = (entries * dual).sum(dim=-1)[..., None, None] / 2
        kept |= {"p2": pfaffian.square(), "L": pfaffian * skew(dual, size)}
    return kept


def turned(kept: Mapping[str, torch.Tensor], coeff: torch.Tensor) -> torch.Tensor:
    """``R - I`` of the Cayley rotations.

    Args:
        kept: what :func:`powers` gives for matrices (groups, count, size, size).
        coeff: 0-d or (rows, 1, ..., 1).

    Returns:
        (groups, count, size, size), or (rows, 1, ..., groups, count, size, size).
    """
    K, c = kept["K"], (coeff / 2)[..., None, None, None]
    if K.shape[-1] > 4:  # in float64, since no pivots are chosen
        X = (c * K).to(torch.float64)
        return (inverse(torch.eye(K.shape[-1], dtype=X.dtype, device=K.device) - X) @ (2 * X)).to(K.dtype)
    square, determinant, whole = c * c, kept["s"], K + c * kept["K2"]
    if "p2" in kept:
        p2 = square * kept["p2"]
        eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
        whole, determinant = whole + square * kept["L"] - c * p2 * eye, determinant + p2
    return 2 * c * whole / (1 + square * determinant)


def skew(entries: torch.Tensor, size: int) -> torch.Tensor:
    """Skew matrices (..., size, size) of upper triangles by rows, (..., size(size-1)/2)."""
    rows, start = [], 0
    for i in range(size - 1):
        stop = start + size - 1 - i
        rows.append(F.pad(entries[..., start:stop], (i + 1, 0)))
        start = stop
    upper = F.pad(torch.stack(rows, dim=-2), (0, 0, 0, 1))
    return upper - upper.mT


def inverse(M: torch.Tensor) -> torch.Tensor:
    """Inverse of matrices (..., n, n) whose symmetric part is positive definite, by halves and Schur complements."""
    n = M.shape[-1]
    if n == 1:
        return 1 / M
    if n == 2:  # the adjugate over the determinant
        eye = torch.eye(2, dtype=M.dtype, device=M.device)
        trace, other = M.diagonal(dim1=-2, dim2=-1).sum(-1), M[..., 0, 1] * M[..., 1, 0]
        determinant = M[..., 0, 0] * M[..., 1, 1] - other
        return (trace[..., None, None] * eye - M) / determinant[..., None, None]
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
        D: (groups, count, bs, bs), or (rows, 1, ..., groups, count, bs, bs) with one D per row of h.
    """
    groups, count, size = D.shape[-4:-1]
    width = count * size
    eye = torch.eye(count, dtype=D.dtype, device=D.device)
    dense = D[..., :, None, :] * eye[:, None, :, None]
    if D.dim() == 4:  # one D for all: every token is a row
        x = h.reshape(-1, groups, width).transpose(0, 1)
        return (x @ dense.reshape(groups, width, width).mT).transpose(0, 1).reshape(h.shape)
    x = h.reshape(h.shape[0], -1, groups, width).transpose(1, 2)
    return (x @ dense.reshape(-1, groups, width, width).mT).transpose(1, 2).reshape(h.shape)
