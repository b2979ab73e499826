"""Truncated singular value decomposition of a weight: exact or randomised, deterministic, sign-canonical, measured.

==============  ====================================================================================================
``gram``        eigenvectors of the smaller Gram matrix in float64 (of a large one, refined from float32): as exact as
                a full SVD in float32 while ``S_r > 1e-5 S_1``, and 1.4 to 5 times faster
``svd``         the full SVD in float64; where ``gram`` would not be exact enough, and for float64 weights
``randomised``  a range finder (Halko, Martinsson and Tropp 2011, arXiv:0909.4061) with a Chebyshev filter (Zhou, Saad,
                Tiago and Chelikowsky 2006), several times faster for ``r`` much below ``d``; ``residual`` says how far
                off it is
==============  ====================================================================================================

``"exact"`` asks for one of the first two, ``"auto"`` takes the third only for large weights and small ranks. The same
weight gives the same bits with any number of threads (see ``surgery.support.determinism``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from surgery.errors import VariantError, WeightError
from surgery.support.determinism import one_thread

GRAM_LIMIT = 1e-5  # of S_r over S_1: below, a Gram matrix in float64 is not as exact as a full SVD in float32
METHODS = ("auto", "exact", "randomised")
LARGE, FEW = 2048, 16  # "auto" is randomised for weights of at least LARGE each way and ranks up to a FEW-th of that
OVERSAMPLING, PRODUCTS = 16, 3  # of the range finder: further directions, and products with the Gram matrix
NARROW, MEDIUM, WIDE = 10, 4000, 10000  # of the largest over half the smallest Ritz value: what float32 bears
PROBES, BLOCK = 8, 128  # random vectors that estimate a residual; columns of a diagonal block of a Gram matrix
REFINED, REFINED_LIMIT, REFINED_RESIDUAL = 512, 3e-2, 1e-6  # smallest size, S_r over S_1, residual over S_1^2
ORTHONORMAL = 1e-4  # within which a randomised result has to be orthonormal
RANDOMISED_LIMIT = 1e-3  # of S_r over S_1: below, a Gram matrix in float32 no longer sees the direction

Triples = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
def factorise(weight: torch.Tensor, r: int, method: str = "auto", seed: int = 0) -> Factorisation:
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
        found = _randomised(W, r, seed)
        result = None if found is None else _finished(W, scale, found, "randomised")
        if result is not None and result.error < ORTHONORMAL:
            return result
    W, scale = _scaled(weight, torch.float64)
    found = None if weight.dtype == torch.float64 else _gram(W, r)
    return _finished(W, scale, found or _svd(W, r), "gram" if found else "svd")


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
    """``E |R z|^2 = |R|^2`` for normal z: a thin product, where R itself would cost as much as a factorisation step."""
    probes = torch.randn(PROBES, len(S), generator=torch.Generator().manual_seed(0)).to(W)
    scaled = probes * S  # all by rows: products with few columns take 2 to 8 times as long
    left = (probes @ Vh) @ W.T - scaled @ U.T
    right = (probes @ U.T) @ W - scaled @ Vh
    norm = torch.hypot(torch.linalg.vector_norm(left), torch.linalg.vector_norm(right)) / PROBES**0.5
    return float(norm / torch.linalg.vector_norm(S).clamp(min=1e-300))


def gram_matrix(A: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
    """``A^T A``, or ``A^T image`` where that is symmetric, from the products on and below the diagonal."""
    out = A.new_empty(A.shape[1], A.shape[1])
    _fill(out, A, A if image is None else image, 0, A.shape[1])
    return out


def _fill(out: torch.Tensor, A: torch.Tensor, image: torch.Tensor, start: int, stop: int) -> None:
    """Fill a diagonal block of a symmetric product, by halves."""
    if stop - start <= BLOCK:
        torch.mm(A[:, start:stop].T, image[:, start:stop], out=out[start:stop, start:stop])
        return
    middle = (start + stop) // 2
    _fill(out, A, image, start, middle)
    _fill(out, A, image, middle, stop)
    torch.mm(A[:, middle:stop].T, image[:, start:middle], out=out[middle:stop, start:middle])
    out[start:middle, middle:stop] = out[middle:stop, start:middle].T


def _gram(W: torch.Tensor, r: int) -> Triples | None:
    """Top r through the smaller of ``W W^T`` and ``W^T W``; None where it would not be exact enough."""
    wide = W.shape[0] <= W.shape[1]
    G = gram_matrix(W.T if wide else W)
    found = _refined(G, r) if min(W.shape) >= REFINED and r * 3 <= min(W.shape) else None
    if found is None:
        values, vectors = torch.linalg.eigh(G)
        found = values[-r:].flip(0), vectors[:, -r:].flip(1)
    S, basis = found[0].clamp(min=0).sqrt(), found[1]
    if not S[-1] > GRAM_LIMIT * S[0]:
        return None
    other = (W.T @ basis if wide else W @ basis) / S
    return (basis, S, other.T) if wide else (other, S, basis.T)


def _refined(G: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Top r eigenpairs of a Gram matrix: all in float32, then refined in float64 within a slightly larger subspace.

    What the float32 vectors miss of the subspace is of second order in the eigenvalues. It is damped once by a linear
    filter, and then measured: ``|G v - lambda v|`` bounds the angle times the gap.

    Returns:
        Eigenvalues, descending, and their vectors; None if they span so many decades, or the residual is so large, that
        float64 throughout is needed.
    """
    size = r + max(2 * OVERSAMPLING, r // 8)
    rough, vectors = torch.linalg.eigh(G.to(torch.float32))
    if not rough[-r] > REFINED_LIMIT**2 * rough[-1]:
        return None
    half = rough[-size].to(torch.float64).clamp(min=0) / 2
    basis = vectors[:, -size:].to(torch.float64)
    basis = G @ basis - half * basis
    basis = basis / torch.linalg.vector_norm(basis, dim=0)
    orthonormal = _orthonormal(basis)
    if orthonormal is None:
        return None
    basis, image = orthonormal, G @ orthonormal
    values, inner = torch.linalg.eigh(basis.T @ image)
    values, inner = values[-r:].flip(0), inner[:, -r:].flip(1)
    found = basis @ inner
    residual = torch.linalg.vector_norm(image @ inner - found * values, dim=0).max()
    return (values, found) if residual < REFINED_RESIDUAL * values[0] else None


def _svd(W: torch.Tensor, r: int) -> Triples:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


def _randomised(W: torch.Tensor, r: int, seed: int) -> Triples | None:
    """Top r within a random subspace that is filtered towards the largest singular values.

    A power iteration on ``W^T W`` (of the smaller side), then a Chebyshev polynomial that stays within [-1, 1] below
    the smallest Ritz value and grows fastest above it: of degree 3 in a narrow spectrum, which converges slowest, and
    else of degree 2, applied to Ritz vectors, whose images stay apart. More would bury the smaller ones in rounding, as
    this would in a wide spectrum, where two more power iterations do as well. Large products are in float32.

    Returns:
        The triples; None where the spectrum is too wide for float32, or the subspace is most of the whole.
    """
    tall = W if W.shape[0] >= W.shape[1] else W.T
    rows, columns = tall.shape
    size = r + OVERSAMPLING
    if 2 * size > columns:
        return None
    formed = rows * columns / 2 + PRODUCTS * columns * size < PRODUCTS * 2 * rows * size  # FLOPs over 2 columns
    gram = gram_matrix(tall) if formed else None

    def factors(basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two matrices whose product is that of the Gram matrix with a basis."""
        return (gram, basis) if gram is not None else (tall.T, tall @ basis)

    noise = torch.rand(columns, size, generator=torch.Generator().manual_seed(seed)) - 0.5
    basis = _orthonormal(torch.mm(*factors(noise.to(W))))
    if basis is None:
        return None
    image = torch.mm(*factors(basis))
    values, vectors = torch.linalg.eigh(gram_matrix(basis, image))
    half, largest = float(values[0]) / 2, float(values[-1])
    if not half > 0:
        return None
    narrow = largest < NARROW * half
    if not narrow:
        basis, image = basis @ vectors, image @ vectors

    def step(twice: torch.Tensor, once: torch.Tensor) -> torch.Tensor:
        """The recurrence ``2 A once - twice`` with ``A = G / half - 1``, which maps [0, 2 half] to [-1, 1]."""
        return torch.add(twice, once, alpha=2).addmm_(*factors(once), beta=-1, alpha=2 / half)

    if largest < WIDE * half:
        once = image.div_(half).sub_(basis)
        filtered = step(basis, once)
        if narrow:
            filtered = step(once, filtered)
    else:
        basis = _orthonormal(image / torch.linalg.vector_norm(image, dim=0))
        if basis is None:
            return None
        filtered = torch.mm(*factors(basis))
    filtered /= torch.linalg.vector_norm(filtered, dim=0)
    image, small = tall @ filtered, W.dtype if narrow else torch.float64
    measured = W.dtype if largest < MEDIUM * half else torch.float64
    factor, dependent = torch.linalg.cholesky_ex(gram_matrix(filtered.to(torch.float64)))
    if int(dependent):
        return None
    factor = factor.to(small)
    inner = torch.linalg.solve_triangular(factor, gram_matrix(image.to(measured)).to(small), upper=False)
    values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, inner.T, upper=False))
    S, vectors = values[-r:].flip(0).clamp(min=0).to(torch.float64).sqrt(), vectors[:, -r:].flip(1)
    right = torch.linalg.solve_triangular(factor.T, vectors, upper=True).to(W.dtype)
    if not S[-1] > RANDOMISED_LIMIT * S[0]:
        return None
    left, right = image @ (right / S.to(right.dtype)), filtered @ right
    return (left, S, right.T) if tall is W else (right, S, left.T)


def _orthonormal(Y: torch.Tensor) -> torch.Tensor | None:
    """Orthonormal basis of the columns by the Cholesky factor of their Gram matrix, in float64; None if they depend on
    each other."""
    factor, dependent = torch.linalg.cholesky_ex(gram_matrix(Y.to(torch.float64)))
    if int(dependent):
        return None
    basis: torch.Tensor = torch.linalg.solve_triangular(factor.to(Y.dtype), Y.T, upper=False)
    return basis.T


def signs_of(U: torch.Tensor) -> torch.Tensor:
    """The sign that makes the largest entry of each column of U positive."""
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    return torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
