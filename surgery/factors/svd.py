"""Truncated singular value decomposition of a weight: exact or randomised, deterministic, sign-canonical, measured.

==============  ====================================================================================================
``gram``        eigenvectors of the smaller Gram matrix in float64 (of a large one, refined from float32): as exact as
                a full SVD in float32 while ``S_r > 1e-5 S_1``, and 1.4 to 5 times faster
``svd``         the full SVD in float64; where ``gram`` would not be exact enough, and for float64 weights
``randomised``  a range finder with a Chebyshev filter, several times faster for ``r`` much below ``d``; ``residual``
                says how far off it is
==============  ====================================================================================================

``"exact"`` asks for one of the first two, ``"auto"`` takes the third only for large weights and small ranks. The same
weight gives the same bits with any number of threads (see ``surgery.support.determinism``).

===============  ============  =====================================================================================
constant         value         where it comes from
===============  ============  =====================================================================================
``LARGE, FEW``   2048, 16      commit de8fe2d: below, exact is taken, which there costs a second at most (2048, r = 128:
                               1.1 s against 0.11 s)
``PROBES``       8             commit f196c9f, before it 16: the estimated residual of a (400, 300) weight scatters by
                               9, 4, 3% with 4, 8, 16
``ORTHONORMAL``  1e-4          commit 1add20a: a randomised result is off orthonormal by 1e-6 as a rule; by 1e-4, which
                               happens in narrow spectra of small weights, the exact method takes over
===============  ============  =====================================================================================

Those of the methods stand in ``exact_svd``, ``range_finder`` and ``gram``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from surgery.errors import VariantError, WeightError
from surgery.factors.exact_svd import Triples, full_triples, gram_triples
from surgery.factors.gram import gram_matrix
from surgery.factors.range_finder import randomised_triples
from surgery.support.determinism import one_thread

Method = Literal["auto", "exact", "randomised"]
METHODS: tuple[Method, ...] = get_args(Method)
LARGE, FEW = 2048, 16  # "auto" is randomised for weights of at least LARGE each way and ranks up to a FEW-th of that
PROBES = 8  # random vectors that estimate a residual
ORTHONORMAL = 1e-4  # within which a randomised result has to be orthonormal


class Factorisation(NamedTuple):
    """``W ~ U diag(S) Vh`` with S descending; float64 (U and Vh of the randomised method float32), on W's device.

    Attributes:
        U, S, Vh: (d_out, r), (r,), (r, d_in).
        method: how it was computed.
        error: largest deviation of U and V from orthonormal columns (of an oblique ``Vh``, of U alone).
        residual: Frobenius norm of ``(W V - U S, W^T U - V S)`` over that of S, estimated with random vectors; rounding
            for an exact method.
        energy: share of the squared Frobenius norm that the r directions hold.
        core: frozen core tensors that the choice of directions gives, by name.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    method: str
    error: float
    residual: float
    energy: float
    core: dict[str, torch.Tensor] = {}  # noqa: RUF012  (never written)

    def keep(self, indices: torch.Tensor) -> Factorisation:
        """The chosen directions, in the order of the indices."""
        S = self.S[indices]
        whole = self.S.square().sum().clamp(min=1e-300)
        share = float(S.square().sum() / whole)
        U, Vh = self.U[:, indices].contiguous(), self.Vh[indices].contiguous()
        return self._replace(U=U, S=S, Vh=Vh, energy=self.energy * share)


@one_thread()
def factorise(weight: torch.Tensor, r: int, method: Method = "auto", seed: int = 0) -> Factorisation:
    """Compute the r largest singular triples of a weight.

    Args:
        weight: (d_out, d_in), finite, any floating-point dtype.
        r: at most ``min(d_out, d_in)``.
        method: "auto", "exact" or "randomised".
        seed: of the randomised method's test matrix.

    Raises:
        VariantError: the method is unknown.
        WeightError: singular values are beyond float64.

    Source: Eckart and Young 1936; the sign convention is that of ``sklearn.utils.extmath.svd_flip``.
    """
    if method not in METHODS:
        raise VariantError(f"svd_method must be one of {', '.join(METHODS)}, found {method!r}")
    weight, smaller = weight.detach(), min(weight.shape)
    large = smaller >= LARGE and r * FEW <= smaller
    if method == "randomised" or (method == "auto" and large):
        W, scale = _scaled(weight, torch.float32)
        found = randomised_triples(W, r, seed)
        result = None if found is None else _finished(W, scale, found, "randomised")
        if result is not None and result.error < ORTHONORMAL:
            return result
    W, scale = _scaled(weight, torch.float64)
    found = None if weight.dtype == torch.float64 else gram_triples(W, r)
    return _finished(W, scale, found or full_triples(W, r), "gram" if found else "svd")


def _scaled(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A huge or tiny weight over its largest entry, which keeps its Gram matrix in range, and that entry, or 1."""
    W = weight.to(dtype)
    if 1e-6 < float(torch.linalg.vector_norm(W)) / W.numel() ** 0.5 < 1e6:
        return W, torch.ones((), dtype=torch.float64, device=W.device)
    scale = weight.abs().max().to(torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
    return (weight.to(torch.float64) / scale).to(dtype), scale


def _finished(W: torch.Tensor, scale: torch.Tensor, found: Triples, method: str) -> Factorisation:
    """Canonical signs, and what is measured of the triples."""
    U, S, Vh = found
    signs = signs_of(U)
    U, Vh = U * signs, Vh * signs[:, None].to(Vh.dtype)
    energy = float(
        (S.square().sum() / torch.linalg.vector_norm(W).to(S.dtype).square().clamp(min=1e-300)).clamp(max=1.0)
    )
    error, residual = max(deviation(U.T), deviation(Vh)), _residual(W, U.to(W.dtype), S.to(W.dtype), Vh.to(W.dtype))
    S = S * scale
    if not torch.isfinite(S).all():
        raise WeightError("its singular values overflow float64; scale the weight down")
    return Factorisation(U.contiguous(), S, Vh.contiguous(), method, error, residual, energy)


def deviation(rows: torch.Tensor) -> float:
    """Largest deviation of ``rows rows^T`` from the identity."""
    inner = gram_matrix(rows.T)
    inner.diagonal().sub_(1.0)
    return float(inner.abs().max())


def _residual(W: torch.Tensor, U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> float:
    """``E |R z|^2 = |R|^2`` for normal z: low-rank products, where R itself would cost as much as a Gram matrix."""
    probes = torch.randn(PROBES, len(S), generator=torch.Generator().manual_seed(0)).to(W)
    scaled = probes * S  # all by rows: products with few columns take 2 to 8 times as long
    left = (probes @ Vh) @ W.T - scaled @ U.T
    right = (probes @ U.T) @ W - scaled @ Vh
    norm = torch.hypot(torch.linalg.vector_norm(left), torch.linalg.vector_norm(right)) / PROBES**0.5
    return float(norm / torch.linalg.vector_norm(S).clamp(min=1e-300))


def signs_of(U: torch.Tensor) -> torch.Tensor:
    """The sign that makes the largest entry of each column of U positive."""
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    return torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
