"""``pair``: the term as the two matrices of a LoRA, ``y = x W^T + b + (x Vh^T) (U D^T)^T`` with ``D = delta(I)``.

``U D^T`` is made once for each value of the core and of coeff, with 2 d_out r^2 FLOPs and d_out r numbers of memory,
where ``dense`` takes d_out d_in of both times r and one. A forward is then two low-rank products, whatever the core is
made of, which for a few tokens is most of what ``lowrank`` costs. In training, and in compiled code, it is ``lowrank``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from surgery.lowerings import ALWAYS, REGISTRY, Size, Work, register
from surgery.lowerings._shared import add_term
from surgery.lowerings._site import Base, LinearSite


@register
class Pair:
    """The factors with the core in one of them."""

    name = "pair"
    form = "delta"
    steers_rows = False
    caches = True
    takes_projection = False

    def why_not(self, site: LinearSite) -> str | None:
        """The variant is not linear."""
        return None if site.variant.linear else f"{site.variant.name} is not linear in its input: there is no matrix D"

    def advised(self, site: LinearSite) -> bool:
        """Always."""
        return True

    def run(self, site: LinearSite, x: torch.Tensor, base: Base) -> torch.Tensor:
        """The base's own forward, plus two low-rank products."""
        if torch.compiler.is_compiling() or site.core.trains():
            return REGISTRY[ALWAYS].run(site, x, base)
        y = base()
        return add_term(site, y, F.linear(x, site.factors.Vh.to(x.dtype)), site.cache.get("pair", left))

    def work(self, size: Size, *, training: bool) -> list[Work]:
        """Two low-rank products, the second of which adds to the output, and the making of one factor."""
        if training:
            return REGISTRY[ALWAYS].work(size, training=True)
        n, d_out, d_in, r, core, item, launches = size
        make = [Work.product(d_out, r, r, max(item, 4)), Work(2.0 * r * core, 0, launches)]
        low_rank = [Work.product(n, r, d_in, item), Work.product(n, d_out, r, item)]
        return [*low_rank, *(work.amortised() for work in make)]


def left(site: LinearSite) -> torch.Tensor:
    """``U D^T`` (d_out, r) without gradients, formed in the core's dtype and rounded to the factors'."""
    with torch.no_grad():
        return site.delta_factor().to(site.factors.U.dtype)
