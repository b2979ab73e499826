"""A range finder with a Chebyshev filter: the r largest singular triples of a weight that is much larger than r.

====================  ======  =======================================================================================
constant              value   where it comes from
====================  ======  =======================================================================================
``OVERSAMPLING``      16      commits c3332c7, before it 32, and f196c9f, before it at least 3 r / 16: the excess
                              residual at r = 64 of a random (1024, 1024) is 3.9e-3, 3.3e-3, 2.2e-3 with 8, 16, 32, in
                              15, 14, 16 ms; promised is 1e-2 (``python -m bench.factors``)
``PRODUCTS``          3       commit de8fe2d: products with the Gram matrix that the filter makes, which say whether to
                              form it
``NARROW``            10      commit f196c9f, before it 300: a spectrum that flat converges slowest, and a filter of
                              degree 3 still stays far from the rounding of float32
``MEDIUM``            4000    commit cb4da4b: up to there the Gram matrix of the result is formed in float32 as well
``WIDE``              10000   commit 29cd85a: beyond, degree 2 squares a ratio to 2e8, past 1 / eps of float32
``RANDOMISED_LIMIT``  1e-3    commit de8fe2d: a Gram matrix in float32 sees an eigenvalue to ``6e-8 (S_1 / S_r)^2``, at
                              1e-3 to 6%
====================  ======  =======================================================================================

Sources: Halko, Martinsson and Tropp 2011, arXiv:0909.4061; Zhou, Saad, Tiago and Chelikowsky 2006.
"""

from __future__ import annotations

import torch

from surgery.factors.exact_svd import Triples
from surgery.factors.gram import gram_matrix, orthonormal_columns

OVERSAMPLING = 16  # further directions of the random subspace
PRODUCTS = 3  # with the Gram matrix, of all directions
NARROW, MEDIUM, WIDE = 10, 4000, 10000  # of the largest over half the smallest Ritz value: what float32 bears
RANDOMISED_LIMIT = 1e-3  # of S_r over S_1: below, a Gram matrix in float32 no longer sees the direction


def randomised_triples(W: torch.Tensor, r: int, seed: int) -> Triples | None:
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
    basis = orthonormal_columns(torch.mm(*factors(noise.to(W))))
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
        basis = orthonormal_columns(image / torch.linalg.vector_norm(image, dim=0))
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
