"""The dense weight of a site."""

from __future__ import annotations

import torch

from passes.errors import InputError
from surgery.errors import VariantError
from surgery.modules.adapter import SSpaceLinear, matrices_of
from surgery.modules.core import Core, Factors
from surgery.variants import Variant

BLOCK = 2**18  # entries of a weight that are summed in float64 at a time, at least of 64 rows


def merged_weight(site: SSpaceLinear, key: str) -> torch.Tensor:
    """``W + dW`` at the present core and coeff, summed in float64 and rounded once; a new tensor.

    Few rows are summed at a time, so that no second weight of eight bytes per entry is held.

    Raises:
        VariantError: the variant is not linear, so that no weight has the same effect.
        InputError: coeff steers rows, or the sum is not finite in the weight's dtype.
    """
    if not site.variant.linear:
        raise VariantError(f"site {key!r}: {site.variant.name} is not linear in its input, so it cannot be merged")
    with torch.no_grad():
        left, factors = site.delta_factor(torch.float64), site.factors
        original = site.weight.to(left.device)  # in residual form it may wait elsewhere
        weight = torch.empty_like(original, memory_format=torch.contiguous_format)
        for base, merged, U, Vh in zip(
            *(_each(matrices_of(w, site.layout, factors.shape)) for w in (original, weight)),
            _each(left),
            _each(factors.Vh),
            strict=True,
        ):
            wide = Vh.to(torch.float64)
            rows = max(64, BLOCK // base.shape[1])
            for part in (slice(start, start + rows) for start in range(0, len(base), rows)):
                merged[part] = base[part].to(torch.float64) + U[part] @ wide
        if not torch.isfinite(weight).all():
            raise InputError(f"site {key!r}: the merged weight overflows {weight.dtype}; lower coeff or the gains")
    return weight


def _each(matrices: torch.Tensor) -> torch.Tensor:
    """A matrix as a stack of one."""
    return matrices if matrices.dim() == 3 else matrices[None]


def bare_site(weight: torch.Tensor, layout: str, variant: Variant, factors: Factors, core: Core) -> SSpaceLinear:
    """A site that belongs to no model, for its weight's sake."""
    site = SSpaceLinear()
    site.weight, site.bias, site.layout = weight, None, layout
    site.variant, site.factors, site.core = variant, factors, core
    return site
