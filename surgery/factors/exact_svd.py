"""The r largest singular triples at least as exact as a full SVD in float32 gives them: by a Gram matrix, or in full.

====================  =====  ========================================================================================
constant              value  where it comes from
====================  =====  ========================================================================================
``GRAM_LIMIT``        1e-5   commit 710cd54, whose suites found 1e-6 too low: the other side's vectors ``W v / S`` are
                             off orthonormal by about ``eps (S_1 / S_r)^2``: 1.7e-7 at 1e-5, 1.9e-5 at 1e-6
``REFINED``           512    commit 1add20a: from here ``eigh`` in float32 and a refinement take less than ``eigh`` in
                             float64 (r = n / 4: 4 of 4 ms at 256, 19 of 21 at 512, 118 of 159 at 1024)
``MARGIN``            32     commit 1add20a: twice what a range finder takes, as nothing is iterated here
``REFINED_LIMIT``     3e-2   commit 1add20a: float32 sees an eigenvalue to ``6e-8 (S_1 / S_r)^2``; the refined ``S_r``
                             is off by 3e-10 at 3e-2, by 3e-8 at 1e-2, and by 1e-5 at 3e-3
``REFINED_RESIDUAL``  1e-6   commit 1add20a: over ``S_1^2``; 3e-8 to 1.5e-7 where ``S_r`` is 0.1 to 1e-3 of ``S_1``
====================  =====  ========================================================================================
"""

from __future__ import annotations

import torch

from surgery.factors.gram import gram_matrix, orthonormal_columns

GRAM_LIMIT = 1e-5  # of S_r over S_1: below, a Gram matrix in float64 is not as exact as a full SVD in float32
REFINED = 512  # smallest size of a Gram matrix whose float32 eigenvectors are refined
MARGIN = 32  # least number of directions beside the r that the refinement looks at
REFINED_LIMIT = 3e-2  # of S_r over S_1: below, float64 is needed throughout
REFINED_RESIDUAL = 1e-6  # of the refined pairs, over S_1^2

Triples = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""U (d_out, r), S (r,), Vh (r, d_in)."""


def gram_triples(W: torch.Tensor, r: int) -> Triples | None:
    """Top r through the smaller of ``W W^T`` and ``W^T W``; None where it would not be exact enough."""
    wide = W.shape[0] <= W.shape[1]
    G = gram_matrix(W.T if wide else W)
    found = refined_pairs(G, r) if min(W.shape) >= REFINED and r * 3 <= min(W.shape) else None
    if found is None:
        values, vectors = torch.linalg.eigh(G)
        found = values[-r:].flip(0), vectors[:, -r:].flip(1)
    S, basis = found[0].clamp(min=0).sqrt(), found[1]
    if not S[-1] > GRAM_LIMIT * S[0]:
        return None
    other = (W.T @ basis if wide else W @ basis) / S
    return (basis, S, other.T) if wide else (other, S, basis.T)


def refined_pairs(G: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Top r eigenpairs of a Gram matrix: all in float32, then refined in float64 within a slightly larger subspace.

    What the float32 vectors miss of the subspace is of second order in the eigenvalues. It is damped once by a linear
    filter, and then measured: ``|G v - lambda v|`` bounds the angle times the gap.

    Returns:
        Eigenvalues, descending, and their vectors; None if they span so many decades, or the residual is so large, that
        float64 throughout is needed.
    """
    size = r + max(MARGIN, r // 8)
    rough, vectors = torch.linalg.eigh(G.to(torch.float32))
    if not rough[-r] > REFINED_LIMIT**2 * rough[-1]:
        return None
    half = rough[-size].to(torch.float64).clamp(min=0) / 2
    basis = vectors[:, -size:].to(torch.float64)
    basis = G @ basis - half * basis
    basis = basis / torch.linalg.vector_norm(basis, dim=0)
    orthonormal = orthonormal_columns(basis)
    if orthonormal is None:
        return None
    basis, image = orthonormal, G @ orthonormal
    values, inner = torch.linalg.eigh(basis.T @ image)
    values, inner = values[-r:].flip(0), inner[:, -r:].flip(1)
    found = basis @ inner
    residual = torch.linalg.vector_norm(image @ inner - found * values, dim=0).max()
    return (values, found) if residual < REFINED_RESIDUAL * values[0] else None


def full_triples(W: torch.Tensor, r: int) -> Triples:
    """Top r of the full SVD."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]
