"""The dense weight of a site."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from passes.errors import InputError
from surgery.errors import VariantError, WeightError

if TYPE_CHECKING:
    from surgery.modules.weight_change import WeightChange


def merged_weight(site: WeightChange, key: str) -> torch.Tensor:
    """``W + dW`` at the present core and coeff, summed in float64 and rounded once; a new tensor.

    Raises:
        VariantError: the variant is not linear, so that no weight has the same effect.
        WeightError: the kind of the base weight takes no change.
        InputError: coeff steers rows, or the sum is not finite in the weight's dtype.
    """
    if not site.variant.linear:
        raise VariantError(f"site {key!r}: {site.variant.name} is not linear in its input, so it cannot be merged")
    with torch.no_grad():
        weight = site.base_weight.with_delta(site.delta_factor(torch.float64), site.factors.Vh)
        if isinstance(weight, str):
            raise WeightError(f"site {key!r} cannot be merged: {weight}")
        if not torch.isfinite(weight).all():
            raise InputError(f"site {key!r}: {why_not_finite(site, f'the merged weight overflows {weight.dtype}')}")
    return weight


def why_not_finite(site: WeightChange, otherwise: str) -> str:
    """Why what follows from a site's tensors is not finite: one of them is not; or else it is too large."""
    factors = {name: getattr(site.factors, name) for name in ("U", "S", "Vh")}
    tensors = {f"core tensor {name!r}": tensor for name, tensor in site.core.tensors().items()}
    tensors |= {f"factor {name}": tensor for name, tensor in factors.items()}
    tensors["base weight"] = site.base_weight.matrix()
    for name, tensor in tensors.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            kind = "NaN" if torch.isnan(tensor).any() else "infinite"
            return f"its {name} is not finite ({bad} of {tensor.numel()} entries, {kind}); train or load it anew"
    return f"{otherwise}; lower coeff or the gains"
