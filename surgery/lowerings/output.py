"""``output``: take the projection from the base's output, ``s = (x W^T) U = S * h``, so that Vh is not read.

For variants whose delta is a function of ``S * h`` alone: ``delta(h; S) = delta(s; 1)``. It needs ``U^T W = S Vh``,
which holds for singular triples (and for CorDA's oblique factors by construction) but not for approximate ones; that is
measured. Cheaper than ``lowrank`` where d_out < d_in, and for few tokens, since U is read twice and Vh never.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from passes.infra.tolerance import RELATIVE
from surgery.lowerings import Size, Work, register
from surgery.lowerings._shared import add_term
from surgery.lowerings._site import Base, LinearSite

PROBES = 8


@register
class Output:
    """The projection of the output."""

    name = "output"
    form = "delta"
    steers_rows = True
    caches = False
    takes_projection = True

    def why_not(self, site: LinearSite) -> str | None:
        """The variant reads h itself, or the factors are not those of the weight."""
        if not site.variant.depends_only_on_Sh:
            return f"the core of {site.variant.name} reads h itself, which the output does not give"
        error = mismatch(site)
        limit = max(RELATIVE[site.base_weight.dtype], RELATIVE[site.factors.U.dtype])
        return None if error <= limit else f"U^T W differs from S Vh by {error:.1e} (approximate factors)"

    def advised(self, site: LinearSite) -> bool:
        """Not in half precision, where it would project the rounding of the output: 2 to 3 times the error."""
        return bool(site.base_weight.dtype.itemsize > 2)

    def run(self, site: LinearSite, x: torch.Tensor, base: Base) -> torch.Tensor:
        """The base's own forward, its projection without the bias, and the term."""
        y: torch.Tensor = base()
        U = site.factors.U.to(y.dtype)
        s = F.linear(y, U.T, None if site.bias is None else -(site.bias.to(y.dtype) @ U))
        return add_term(site, y, site.core_delta(s, torch.ones_like(site.factors.S)), site.factors.U)

    def work(self, size: Size, *, training: bool) -> list[Work]:
        """Two products with U, and in training two more."""
        n, d_out, _, r, core, item, launches = size
        kernels = [Work.product(n, r, d_out, item), Work(2.0 * n * r * d_out, item * n * (r + 2 * d_out))]
        kernels += [Work.pointwise(n * r, item), Work(2.0 * n * core, 0, 1 if training else launches)]
        if training:
            kernels += [Work.product(n, r, d_out, item), Work.product(n, d_out, r, item), Work(4.0 * n * core, 0)]
            kernels += [Work.pointwise(n * r, item, 6), Work.pointwise(n * d_out, item)]
        return kernels


def mismatch(site: LinearSite) -> float:
    """Frobenius norm of ``U^T W - S Vh`` over that of S, estimated by random vectors as ``E |R z|^2 = |R|^2``."""
    with torch.no_grad():
        W = site.base_weight.matrix().detach()
        wide = torch.promote_types(W.dtype, torch.float32)
        z = torch.randn(PROBES, W.shape[1], generator=torch.Generator().manual_seed(0)).to(W.device, wide)
        U, S, Vh = (factor.to(wide) for factor in (site.factors.U, site.factors.S, site.factors.Vh))
        scale = torch.linalg.vector_norm(S).clamp(min=torch.finfo(wide).tiny)
        found = ((z / PROBES**0.5) @ (W.to(wide).T / scale)) @ U
        return float(torch.linalg.vector_norm(found - (z / PROBES**0.5) @ Vh.T * (S / scale)))
