"""The Cayley transform of small skew matrices, and the product with what it makes, for the core that turns directions.

``E = R - I = (I - X)^-1 2X`` needs no solve. With ``X = c K``, ``c = coeff / 2``, and for blocks of up to 4, by Cayley
and Hamilton,

    E = 2c (K + c K^2 + c^2 p K* - c^3 p^2 I) / (1 + c^2 (s + c^2 p^2))        exactly, for every coeff

with ``s = sum_{i<j} K_ij^2``, the Pfaffian ``p`` of K (0 for blocks of 2 and 3), and the dual ``K*`` of K, for which
``p K* = s K + K^3`` without the cancellation. Larger blocks are inverted by halves: ``I - X`` has a positive definite
symmetric part, so every Schur complement has one too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

GROUP = 32  # directions that are turned by one small dense matrix: wider than a block, as products of 4 are slow


def block_of(planes: int) -> int:
    """Size of a block of so many planes."""
    return (1 + math.isqrt(1 + 8 * planes)) // 2


def blocks_together(n: int, size: int) -> int:
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
    found = {"K": K, "K2": K @ K, "s": entries.square().sum(dim=-1)[..., None, None]}
    if size == 4:
        f, e, d, c, b, a = (entries[..., i] for i in range(6))
        dual = torch.stack([a, -b, c, d, -e, f], dim=-1)
        pfaffian = (entries * dual).sum(dim=-1)[..., None, None] / 2
        found |= {"p2": pfaffian.square(), "L": pfaffian * skew(dual, size)}
    return found


def rotation_minus_identity(prepared: Mapping[str, torch.Tensor], coeff: torch.Tensor) -> torch.Tensor:
    """``R - I`` of the Cayley rotations.

    Args:
        prepared: what :func:`powers` gives for matrices (groups, count, size, size).
        coeff: 0-d or (rows, 1, ..., 1).

    Returns:
        (groups, count, size, size), or (rows, 1, ..., groups, count, size, size).
    """
    K, c = prepared["K"], (coeff / 2)[..., None, None, None]
    if K.shape[-1] > 4:  # in float64, since no pivots are chosen
        X = (c * K).to(torch.float64)
        return (inverse(torch.eye(K.shape[-1], dtype=X.dtype, device=K.device) - X) @ (2 * X)).to(K.dtype)
    square, determinant, whole = c * c, prepared["s"], K + c * prepared["K2"]
    if "p2" in prepared:
        p2 = square * prepared["p2"]
        eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
        whole, determinant = whole + square * prepared["L"] - c * p2 * eye, determinant + p2
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
