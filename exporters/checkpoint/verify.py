"""Check merged weights against the adapters that they were made of."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from passes.infra.tolerance import ROUNDED
from surgery.errors import ExportError
from surgery.modules.adapter import Adapter
from surgery.modules.base_weights import matrices_of

BLOCK = 2**17  # entries at a time, at least of 64 columns


def merge_error(site: Adapter, key: str, stored: torch.Tensor) -> float:
    """Compare a merged weight with ``W + dW``, whose columns are the site's own forward of unit vectors, in float64.

    Returns:
        The largest deviation relative to the largest entry.

    Raises:
        ExportError: an entry is off by more than one unit in the last place of the weight's dtype.
    """
    weight = site.weight
    if (stored.shape, stored.dtype) != (weight.shape, weight.dtype):
        raise ExportError(
            f"site {key!r}: the merged weight is {tuple(stored.shape)}, {stored.dtype}, expected "
            f"{tuple(weight.shape)}, {weight.dtype}"
        )
    factors, worst, top = site.factors, 0.0, 0.0
    coeff = site.steering.coeff.to(torch.float64)
    with torch.no_grad():
        base, found = (matrices_of(w, site.layout, factors.shape) for w in (weight, stored.to(weight.device)))
        if factors.stack is None:
            base, found = base[None], found[None]
        columns = max(64, BLOCK // base.shape[1])
        for i in range(len(base)):
            U, S, Vh, *core = (
                (t if factors.stack is None else t[i]).to(torch.float64)
                for t in (factors.U, factors.S, factors.Vh, *site.core.tensors().values())
            )
            named = SimpleNamespace(**dict(zip(site.core.tensors(), core, strict=True)))
            for part in (slice(start, start + columns) for start in range(0, base.shape[2], columns)):
                change = site.variant.delta(Vh[:, part].T.contiguous(), S, named, coeff) @ U.T  # type: ignore[arg-type]
                exact = base[i][:, part].to(torch.float64) + change.T
                off = (found[i][:, part].to(torch.float64) - exact).abs()
                largest = float(exact.abs().max())
                # float64 sums have an error of their own, which matters where an entry cancels
                excess = off - _unit(exact, weight.dtype) - ROUNDED[torch.float64] * largest
                if not bool((excess <= 0).all()):
                    raise ExportError(f"site {key!r}: the merged weight is off by {float(off.max()):.3g}")
                worst, top = max(worst, float(off.max())), max(top, largest)
    return worst / max(top, 1e-300)


def _unit(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The unit in the last place that each value has in a dtype."""
    about = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=about.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(exact, about.eps), exponent - 1)
