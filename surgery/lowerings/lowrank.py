"""``lowrank``: two low-rank products beside the dense one, ``y = x W^T + b + delta(x Vh^T) U^T``.

Every variant, every coefficient. Forward 2 N r (d_in + d_out) FLOPs, backward as many again, since the frozen factors
need no gradient; a LoRA of the same rank needs three times the forward's.
"""

from __future__ import annotations

import torch

from surgery.lowerings import Size, Work, register
from surgery.lowerings._shared import add_term
from surgery.lowerings._site import Base, LinearSite


@register
class LowRank:
    """The default form of a site."""

    name = "lowrank"
    form = "delta"
    steers_rows = True
    caches = False
    takes_projection = False

    def why_not(self, site: LinearSite) -> str | None:
        """Always possible."""
        return None

    def advised(self, site: LinearSite) -> bool:
        """Always."""
        return True

    def run(self, site: LinearSite, x: torch.Tensor, base: Base) -> torch.Tensor:
        """The base's own forward, plus the term."""
        return add_term(site, base(), site.adapter_delta(x), site.factors.U)

    def work(self, size: Size, *, training: bool) -> list[Work]:
        """Two low-rank products and the core; in training their transposes."""
        n, d_out, d_in, r, core, item, launches = size
        products = [Work.product(n, r, d_in, item), Work.product(n, d_out, r, item)]
        kernels = [*products, Work.pointwise(n * r, item), Work(2.0 * n * core, 0, 1 if training else launches)]
        kernels += [Work.pointwise(n * d_out, item, 2)]
        if training:
            back = [Work.product(n, r, d_out, item), Work.product(n, d_in, r, item), Work(4.0 * n * core, 0)]
            kernels += [*back, Work.pointwise(n * r, item, 6), Work.pointwise(n * d_in, item)]
        return kernels
