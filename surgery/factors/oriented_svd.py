"""Factors that are oriented by data: the directions in which a weight acts on its inputs (CorDA, ASVD).

    W (C + eps I) W^T = U diag(S^2) U^T,      P = diag(1/S) U^T W,      U diag(S) P = U U^T W

which is ``SVD(W C^{1/2}) C^{-1/2}`` without inverting C. It comes from the eigenvectors of the smaller of

    W C W^T   (d_out, d_out)       from C, or from the output's own moment ``E[y y^T] + eps W W^T``, which needs no C
    L^T W^T W L   (d_in, d_in)     with the Cholesky factor ``C + eps I = L L^T``;  U = W L Q / S

Source: CorDA (Yang et al. 2024, arXiv:2406.05223).
"""

from __future__ import annotations

import math

import torch

from passes.errors import InputError
from surgery.factors.statistic import Statistic
from surgery.factors.svd import Factorisation, deviation, signs_of
from surgery.support.determinism import one_thread

NEGLIGIBLE = 1e-6  # of S_i over S_1: such a direction gets a zero row in P, since nothing may be divided by its S


@one_thread()
def oriented(
    weight: torch.Tensor, r: int, statistic: Statistic, eps: float, *, relative: bool = False
) -> Factorisation:
    """Compute ``U``, ``S`` and the oblique projector ``P`` (as ``Vh``) of a weight and a second moment of its input.

    Args:
        weight: (d_out, d_in).
        r: at most ``min(d_out, d_in)``.
        statistic: of kind "moment" or "squares".
        eps: added to the diagonal of C.
        relative: take eps as a share of the mean of that diagonal.

    Raises:
        InputError: the second moment is not finite.

    Returns:
        Float64 factors. ``residual`` is how far P is from orthonormal in the inner product of ``C + eps I``, and
        ``energy`` the share of the output's second moment that the r directions hold.
    """
    W, unit = _scaled(weight.detach().to(torch.float64))
    eps = eps * statistic.mean_square() if relative else eps
    d_out, d_in = W.shape
    if d_in < d_out and statistic.side == "input":
        C = torch.diag(statistic.mean("squares")) if statistic.kind == "squares" else statistic.mean("moment")
        U, values, total = _small_input(W, _finite(C), eps, r)
    else:
        moment = _output_moment(statistic, W, unit) + eps * (W @ W.T)
        values, vectors = torch.linalg.eigh(_finite(moment))
        U, values, total = vectors[:, -r:].flip(1), values[-r:].flip(0), values.clamp(min=0).sum()
    S = values.clamp(min=0).sqrt()
    kept = NEGLIGIBLE * S[0] < S
    signs = signs_of(U)
    U = U * signs
    Vh = torch.where(kept[:, None], (U.T @ W) / torch.where(kept, S, 1.0)[:, None], 0.0)
    energy = float((values.clamp(min=0).sum() / total.clamp(min=1e-300)).clamp(max=1.0))
    residual = _residual(statistic, W, unit, U, S, kept, eps)
    return Factorisation(U.contiguous(), S * unit, Vh.contiguous(), "second moment", deviation(U.T), residual, energy)


def _scaled(W: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A huge or tiny weight in units of a power of two, which keeps its squares in range, and that unit, or 1."""
    largest = float(W.abs().max())
    if 1e-60 < largest < 1e60 or largest == 0:
        return W, 1.0
    unit = 2.0 ** max(-1000, min(1000, math.frexp(largest)[1]))
    return W / unit, unit


def _output_moment(statistic: Statistic, W: torch.Tensor, unit: float) -> torch.Tensor:
    """``W C W^T`` of a weight in units."""
    moment = statistic.output_moment(W)
    return moment / unit / unit if statistic.side == "output" else moment


def _finite(moment: torch.Tensor) -> torch.Tensor:
    """Refuse a moment that is out of range, of which there are no eigenvectors."""
    if not torch.isfinite(moment).all():
        raise InputError("the second moment of its data overflows float64; scale the data down")
    return moment


def _small_input(
    W: torch.Tensor, C: torch.Tensor, eps: float, r: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top r of ``W (C + eps I) W^T`` through a matrix of d_in, with an orthonormal completion of U."""
    root = _root(C, eps)
    A = W @ root
    values, vectors = torch.linalg.eigh(_finite(A.T @ A))
    total, values, vectors = values.clamp(min=0).sum(), values[-r:].flip(0), vectors[:, -r:].flip(1)
    S = values.clamp(min=0).sqrt()
    known = int((NEGLIGIBLE * S[0] < S).sum())
    U = torch.linalg.qr(A @ vectors[:, :known])[0]  # dividing by a small S would leave columns that are not orthonormal
    return _completed(U, r), values, total


def _root(C: torch.Tensor, eps: float) -> torch.Tensor:
    """``L`` with ``L L^T = C + eps I``: Cholesky, or by eigenvalues where C is singular and eps does not help."""
    moment = C + eps * torch.eye(len(C), dtype=C.dtype, device=C.device)
    factor: torch.Tensor
    factor, info = torch.linalg.cholesky_ex(moment)
    if not int(info):
        return factor
    values, vectors = torch.linalg.eigh(moment)
    root: torch.Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def _completed(Q: torch.Tensor, r: int) -> torch.Tensor:
    """Orthonormal columns, completed to r by any others."""
    if Q.shape[1] == r:
        return Q
    generator = torch.Generator().manual_seed(0)
    fill = torch.randn(Q.shape[0], r - Q.shape[1], generator=generator, dtype=torch.float64).to(Q.device)
    for _ in range(2):
        fill = fill - Q @ (Q.T @ fill)
        fill = torch.linalg.qr(fill)[0]
    return torch.cat([Q, fill], dim=1)


def _residual(
    statistic: Statistic,
    W: torch.Tensor,
    unit: float,
    U: torch.Tensor,
    S: torch.Tensor,
    kept: torch.Tensor,
    eps: float,
) -> float:
    """How far P is from orthonormal in the inner product of C + eps I, over the directions that P has."""
    if not kept.any():
        return 0.0
    directions = U[:, kept].T @ W
    moment = _output_moment(statistic, W, unit) if statistic.side == "output" else None
    inner = U[:, kept].T @ moment @ U[:, kept] if moment is not None else statistic.weigh(directions) @ directions.T
    inner = (inner + eps * (directions @ directions.T)) / (S[kept][:, None] * S[kept])
    return float((inner - torch.eye(len(inner), dtype=inner.dtype, device=inner.device)).abs().max())
