"""Find out whether factors are those of a weight, by random vectors.

A basis promises ``U^T U = I``, perhaps ``Vh Vh^T = I``, and ``U^T W = S Vh`` (of singular triples that a range finder
found, that or ``W V = U S``). Forming these products would cost as much as a part of the factorisation; each side times
a few random vectors costs as much as a forward of so many tokens, and tells what is off in any direction (Freivalds
1977). The vectors are other ones each time, so that no file can be made to fit them.
"""

from __future__ import annotations

import functools
import secrets

import torch

from passes.infra.tolerance import RELATIVE
from surgery.modules.core import Factors
from surgery.variants import Variant

PROBES = 8
ORTHONORMAL = 2e-3  # a randomised factorisation is within 1e-4 in each entry of U^T U - I; see surgery.factors.svd
PRODUCT = 5e-5  # in float32, of the largest direction of the weight, where U^T W x is summed in blocks


def why_not_of(
    matrix: torch.Tensor | None, factors: Factors, variant: Variant, dtypes: tuple[torch.dtype, ...] = ()
) -> str | None:
    """Why factors are not those of a weight, or None where they are, up to the rounding of their dtypes.

    Args:
        matrix: (d_out, d_in), or a stack of them; None where it was trained since, and only the basis is asked.
        variant: whose basis says what holds of its factors.
        dtypes: that weight and factors were rounded to before, beside those that they have.
    """
    known = [factors.U.dtype, factors.S.dtype, *dtypes, *(() if matrix is None else (matrix.dtype,))]
    rounding, gives = max(RELATIVE[dtype] for dtype in known), variant.basis_config.gives
    with torch.no_grad():
        wide = functools.reduce(torch.promote_types, known, torch.float32)
        U, S, Vh = (t.to(wide) for t in (factors.U, factors.S, factors.Vh))
        if (S < 0).any() or (S[..., 1:] > S[..., :-1]).any():
            return "its singular values are negative, or not in descending order"
        for name, rows in (("U", U.mT), ("Vh", Vh)):
            if f"orthonormal {name}" in gives and not (off := _not_orthonormal(rows)) <= max(ORTHONORMAL, rounding):
                return f"its factor {name} is not orthonormal (off by {off:.1e})"
        if matrix is None:
            return None
        matrix, limit = matrix.detach().to(U.device), max(PRODUCT, rounding)
        off = _apart(matrix, U, S, Vh)
        if not off <= limit and "orthonormal Vh" in gives:
            off = min(off, _apart(matrix.mT, Vh.mT, S, U.mT))
    return None if off <= limit else f"U^T W is not S Vh (off by {off:.1e} of the largest direction)"


def _vectors(n: int, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    return torch.randn(n, PROBES, generator=generator, dtype=torch.float64).to(like)


def _not_orthonormal(rows: torch.Tensor) -> float:
    """The largest norm, estimated, of a row of ``rows rows^T - I``."""
    z = _vectors(rows.shape[-2], rows)
    return float(_norms(rows @ (rows.mT @ z) - z).max())


def _apart(matrix: torch.Tensor, U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> float:
    """The largest norm, estimated, of a row of ``U^T W - S Vh`` over the largest one of a row of ``U^T W``."""
    scale = matrix.abs().amax().clamp(min=torch.finfo(S.dtype).tiny).to(S.dtype)
    z = _vectors(matrix.shape[-1], S)
    left = U.mT @ ((matrix.to(S.dtype) / scale) @ z)
    off = left - (S / scale)[..., None] * (Vh @ z)
    used = Vh.abs().amax(dim=-1) > 0  # an oblique basis has rows of zeros, which stand for nothing
    worst = _norms(off)[used].max() if bool(used.any()) else off.new_zeros(())
    return float(worst / _norms(left).max().clamp(min=1e-30))


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """The norms of the rows of a matrix that was multiplied by the random vectors."""
    return torch.linalg.vector_norm(rows / PROBES**0.5, dim=-1)  # type: ignore[no-any-return]
