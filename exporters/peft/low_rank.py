"""Products of two narrow matrices, ``B A`` with B (..., d_out, r) and A (..., r, d_in): their rank and best truncation.

With ``B = Q_b R_b`` and ``A^T = Q_a R_a``, the singular values of ``B A`` are those of the small ``R_b R_a^T``. This
holds for rows of A that are not orthonormal too, and by Eckart and Young the leading triples are the best truncation in
both norms. Everything is in float64, and one call serves a stack of products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROUNDING = 16 * torch.finfo(torch.float64).eps  # per row or column: what two QRs and an SVD in float64 leave of a zero


@dataclass(frozen=True)
class LowRankProduct:
    """``B A`` as it is written, and how far it is from what it stands for.

    Attributes:
        B, A: (..., d_out, rank) and (..., rank, d_in) in the written dtype.
        pruned: directions of a numerical rank were left out.
        spectral_error, frobenius_error: of ``B A``, relative to the norms of the exact product.
    """

    B: torch.Tensor
    A: torch.Tensor
    pruned: bool
    spectral_error: float
    frobenius_error: float

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.A.shape[-2]

    def product(self) -> torch.Tensor:
        """``B A`` in float64."""
        return self.B.to(torch.float64) @ self.A.to(torch.float64)


def product_svd(B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular triples ``P, s, Q`` of ``B A``, by a QR of each factor and the SVD of a small matrix."""
    Q_b, R_b = torch.linalg.qr(B)
    Q_a, R_a = torch.linalg.qr(A.mT)
    P, s, Q = torch.linalg.svd(R_b @ R_a.mT, full_matrices=False)
    return Q_b @ P, s, Q @ Q_a.mT


def low_rank(
    B: torch.Tensor, A: torch.Tensor, dtype: torch.dtype, max_rank: int | None = None, prune_tol: float = 0.0
) -> LowRankProduct:
    """Write ``B A`` with as few directions as it has, and with no more than are allowed.

    Where every direction counts, B and A are kept as they are. Otherwise A has orthonormal rows, and B the singular
    values. A product of zeros has one direction.

    Args:
        B, A: factors in float64; of a stack, all products get the largest rank that one of them needs.
        dtype: of the result.
        max_rank: upper bound of the rank.
        prune_tol: leave out directions whose singular value is at most this share of the largest.
    """
    P, s, Q = product_svd(B, A)
    zero = ROUNDING * max(B.shape[-2], A.shape[-1])
    numerical, wanted = (_rank(s, share) for share in (zero, max(zero, prune_tol)))
    rank = wanted if max_rank is None else min(wanted, max_rank)
    if rank == A.shape[-2]:
        left, right = B, A
    else:
        left, right = P[..., :rank] * s[..., None, :rank], Q[..., :rank, :]
    left, right = left.to(dtype).contiguous(), right.to(dtype).contiguous()
    wide = [factor.to(torch.float64) for factor in (left, right)]
    if not all(factor.isfinite().all() for factor in wide):
        return LowRankProduct(left, right, rank < numerical, float("inf"), float("inf"))
    off = product_svd(torch.cat([wide[0], -B], -1), torch.cat([wide[1], A], -2))[1]
    spectral, frobenius = (float(norm(off) / norm(s)) if s.any() else 0.0 for norm in (torch.amax, torch.linalg.norm))
    return LowRankProduct(left, right, rank < numerical, spectral, frobenius)


def _rank(s: torch.Tensor, share: float) -> int:
    return max(1, int((s > share * s[..., :1]).sum(-1).max()))
