"""The remainder of a weight, ``W_res = W - U S Vh``, and the weight that it gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from surgery.modules.core import Factors
    from surgery.modules.site_module import SiteModule


def remainder(site: SiteModule) -> torch.Tensor:
    """``W_res = W - U S Vh`` (d_out, d_in) of the stored factors, in float32 or better."""
    with torch.no_grad():
        W = site.base_weight.matrix().detach().to(device=site.factors.U.device)
        return (W.to(torch.float64) - _top(site.factors)).to(torch.promote_types(W.dtype, torch.float32))


def rebuilt(W_res: torch.Tensor, site: SiteModule, dtype: torch.dtype) -> torch.Tensor:
    """``W_res + U S Vh`` in the layout of the weight, summed in float64 and rounded once."""
    with torch.no_grad():
        weight = (W_res.to(torch.float64) + _top(site.factors)).to(dtype)
        return weight if site.layout == "out_in" else weight.T.contiguous()


def _top(factors: Factors) -> torch.Tensor:
    U, S, Vh = (factor.to(torch.float64) for factor in (factors.U, factors.S, factors.Vh))
    return (U * S) @ Vh
