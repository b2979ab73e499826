"""Recompute factors from the base weight at load time, and verify them by a digest.

A core means nothing in another basis, and its entries belong to single directions, so that every direction has to come
out the same, and not just the subspace. With fixed random ``a_j``, ``b_j``, ``c_j`` (uniform, of mean 0 and variance 1)
the digest of a matrix is

    sum_i c_ji S_i / |S|,    sum_i c_ji (a_j . u_i) / sqrt(r),    sum_i c_ji (b_j . v_i) / sqrt(r),      j = 1 ... 4

which are numbers of the order of 1. A pair of directions that is turned by an angle t moves the latter by about
``t sqrt(2 / r)``, whereas rounding moves them by 1e-10 and less: where singular values are well apart, other processors
find the same directions, and where they coincide, no two need agree.
"""

from __future__ import annotations

import torch

from surgery.errors import AdapterError
from surgery.factors.svd import Factorisation
from surgery.modules.base_weights import BaseWeight
from surgery.modules.core import Factors
from surgery.planning.adapter_init import as_factors, factorised
from surgery.support.fingerprint import DTYPES
from surgery.support.untrusted_files import JsonObject
from surgery.variants import Variant

SUMS = 4
TOLERANCE = 1e-4  # of a digest's numbers, which are of the order of 1; and of the factors' Frobenius norm


def recompute(
    where: str, config: Variant, matrices: torch.Tensor, r: int, seed: int
) -> tuple[Factorisation, torch.Tensor]:
    """Factorise a weight as surgery without calibration does.

    Args:
        matrices: (d_out, d_in), or (stack, d_out, d_in).

    Returns:
        The factors in float64, and their digest (3, 4), of a stack (stack, 3, 4).

    Raises:
        AdapterError: the variant chooses its factors by data.
    """
    if config.needs_calibration or config.frozen:
        raise AdapterError(f"{where}: {config.name} chooses its factors by data, so that they have to be stored")
    with torch.inference_mode(False), torch.no_grad():
        factors = factorised(config, matrices.detach(), r, None, seed)
        return factors, digest(factors)


def recompute_stored(
    where: str, entry: JsonObject, variant: Variant, base: BaseWeight, stored: torch.Tensor
) -> Factorisation:
    """Recompute the factors of a site in a file, and check them by the digest that is stored there.

    Args:
        entry: what the configuration says of the site.
        stored: the digest.

    Raises:
        AdapterError: the weight was rounded to a narrower dtype, or the factors are others.
    """
    dtype = base.dtype_name
    if dtype in entry["casts"]:
        raise AdapterError(
            f"{where}: factors of a {entry['dtype']} weight cannot be recomputed from it in {dtype}; load "
            f"the adapter on the model in {entry['dtype']}, and cast that"
        )
    wide = base.matrix().to(DTYPES[entry["dtype"]])
    factors, computed = recompute(where, variant, wide, entry["r"], entry["seed"])
    _check_digest(where, computed, stored)
    return factors


def digest(factors: Factorisation | Factors) -> torch.Tensor:
    """The numbers that tell factors from others; float64, on the CPU."""
    if factors.S.dim() == 2:
        return torch.stack([_digest(*parts) for parts in zip(factors.U, factors.S, factors.Vh, strict=True)])
    return _digest(factors.U, factors.S, factors.Vh)


def _digest(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> torch.Tensor:
    U, S, Vh = (t.detach().cpu().to(torch.float64) for t in (U, S, Vh))
    generator, r = torch.Generator().manual_seed(0), len(S)
    c, a, b = (_uniform(n, generator) for n in (r, U.shape[0], Vh.shape[1]))
    values = c @ S / torch.linalg.vector_norm(S).clamp(min=1e-300)
    left, right = ((c * probe).sum(dim=1) / r**0.5 for probe in (a @ U, b @ Vh.T))
    return torch.stack([values, left, right])


def _uniform(n: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(SUMS, n, generator=generator, dtype=torch.float64) - 0.5) * 12**0.5


def _check_digest(where: str, computed: torch.Tensor, stored: torch.Tensor) -> None:
    """Compare the digest of recomputed factors with the stored one.

    Raises:
        AdapterError: the factors are others.
    """
    apart = float((computed - stored).abs().max())
    if not apart <= TOLERANCE:
        raise AdapterError(
            f"{where}: the factors that come of its weight here are not those that the adapter was trained in "
            f"(digests are {apart:.1e} apart, allowed {TOLERANCE:.0e}): singular values lie too close together to be "
            "told apart on every machine. Save the adapter with factors='exact' where it was trained"
        )


def check_follows(where: str, recomputed: Factorisation, factors: Factors) -> None:
    """Check that the factors of a site are those that its weight gives.

    Raises:
        AdapterError: they are not: they were chosen by calibration, or cast.
    """
    expected = as_factors(recomputed, factors.S.dtype, factors.S.device)
    for name in ("U", "S", "Vh"):
        one, other = (getattr(f, name).to(torch.float64) for f in (expected, factors))
        apart = float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other).clamp(min=1e-300))
        if not apart <= TOLERANCE:
            raise AdapterError(
                f"{where}: its factor {name} does not follow from its weight alone (it is {apart:.1e} away): it was "
                "chosen by calibration, or cast from another dtype. Use factors='exact'"
            )
