"""Products ``A^T A``: what factorisations and second moments are made of.

=========  =====  ==================================================================================================
constant   value  where it comes from
=========  =====  ==================================================================================================
``BLOCK``  128    commit cb4da4b, before it 256: (1024, 1024) in float32 takes 9.1 ms with either, 9.6 with 64, and 11.0
                  as one product; smaller blocks waste less above the diagonal
=========  =====  ==================================================================================================
"""

from __future__ import annotations

import torch

BLOCK = 128  # columns of a diagonal block, which is formed whole


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


def orthonormal_columns(Y: torch.Tensor) -> torch.Tensor | None:
    """Orthonormal basis of the columns by the Cholesky factor of their Gram matrix, in float64; None if they depend on
    each other."""
    factor, dependent = torch.linalg.cholesky_ex(gram_matrix(Y.to(torch.float64)))
    if int(dependent):
        return None
    basis: torch.Tensor = torch.linalg.solve_triangular(factor.to(Y.dtype), Y.T, upper=False)
    return basis.T
