"""``dense``: one plain product with ``W + dW``, computed once for each value of the core and of coeff.

Inference costs what the base costs. In training dx goes through the same product, and the core gets its gradient
without the d_out x d_in gradient of a weight: with ``h = x Vh^T`` and ``p = dy U`` it is that of ``<p, delta(h)>``.
That is 2 N r (d_in + d_out) FLOPs and 2 d_out d_in r for the weight, where ``lowrank`` needs 4 N r (d_in + d_out).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from surgery.lowerings import Size, Work, register
from surgery.lowerings._shared import with_gradient_of
from surgery.lowerings._site import Base, LinearSite
from surgery.lowerings._weight_cache import SITES
from surgery.support.strides import laid_out_like, overlaps


@register
class Dense:
    """The materialised weight."""

    name = "dense"
    form = "delta"
    steers_rows = False
    caches = True
    takes_projection = False

    def why_not(self, site: LinearSite) -> str | None:
        """The variant is not linear, or the module has a forward of its own."""
        if not site.variant.linear:
            return f"{site.variant.name} is not linear in its input: there is no weight"
        if not site.base_weight.holds_entries:
            return "the weight is quantised"
        if overlaps(site.base_weight.tensor()):
            return "entries of the weight overlap in memory, which those of a changed one cannot"
        return None if site.host.exact else "the module's own forward is not that of nn.Linear"

    def advised(self, site: LinearSite) -> bool:
        """Always."""
        return True

    def run(self, site: LinearSite, x: torch.Tensor, base: Base) -> torch.Tensor:
        """One product; while the core is trained, with a term of value zero that has the core's gradient."""
        if not site.core.trains():
            if torch.compiler.is_compiling() and not torch.is_grad_enabled() and not site.core.learns():
                reads = [site.weight, site.steering.coeff, *site.core.parameters()]
                return torch.ops.surgery.dense_linear(x, site.cache.handle, reads, site.factors.U.shape[0])  # type: ignore[no-any-return]
            return product(site, x, _weight(site))
        return with_gradient_of(site, product(site, x, _weight(site)), site.adapter_delta(x.detach()))

    def work(self, size: Size, *, training: bool) -> list[Work]:
        """The weight's own product, spread over several forwards in inference; in training two low-rank products."""
        n, d_out, d_in, r, core, item, _ = size
        wide = max(item, 4)
        make = [Work.product(d_out, d_in, r, wide), Work.pointwise(d_out * d_in, wide, 2 if item == wide else 6)]
        if not training:
            return [work.amortised() for work in make]
        low_rank = [Work.product(n, r, d_in, item), Work.product(n, r, d_out, item), Work(6.0 * n * core, 0)]
        return [*make, *low_rank, Work.pointwise(n * r, item, 6)]


def _weight(site: LinearSite) -> torch.Tensor:
    """The materialised weight; in compiled code that autograd may go through, computed in each forward."""
    return changed(site) if torch.compiler.is_compiling() else cached_weight(site)


def product(site: LinearSite, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What the base computes, with another weight."""
    if site.layout == "out_in":
        return F.linear(x, weight, site.bias)
    assert site.bias is not None  # Conv1D always has one
    return torch.addmm(site.bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


def changed(site: LinearSite) -> torch.Tensor:
    """``W + U delta(Vh^T)^T`` without gradients, in the layout of the weight, formed in the core's dtype."""
    with torch.no_grad():
        factors, weight, wide = site.factors, site.weight.detach(), site.core.dtype
        D = site.core_delta(factors.Vh.T.to(wide), factors.S)  # (d_in, r)
        left, right = factors.U.to(wide), D.T
        if site.layout == "in_out":
            left, right = D, factors.U.to(wide).T
        return laid_out_like(torch.addmm(weight.to(wide), left, right).to(weight.dtype), weight)


def cached_weight(site: LinearSite) -> torch.Tensor:
    """The materialised weight of a site at the present core and coeff."""
    return site.cache.get("dense", changed)  # type: ignore[no-any-return]


OPERATORS = torch.library.Library("surgery", "FRAGMENT")
OPERATORS.define(
    "dense_linear(Tensor x, Tensor handle, Tensor[] reads, SymInt d_out) -> Tensor",
    # Unsafe under CUDA graphs: replay would use the weight captured at record time. flexible_layout: accept any
    # strides, so that Inductor need not copy x.
    tags=(torch.Tag.cudagraph_unsafe, torch.Tag.flexible_layout),
)


def _dense_linear(x: torch.Tensor, handle: torch.Tensor, reads: list[torch.Tensor], d_out: int) -> torch.Tensor:
    """The product of a site with its materialised weight; ``reads`` tells a compiler what it depends on."""
    site = SITES[int(handle)]
    with torch.no_grad():
        return product(site, x, cached_weight(site))


def _dense_linear_shape(x: torch.Tensor, handle: torch.Tensor, reads: list[torch.Tensor], d_out: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], d_out)


OPERATORS.impl("dense_linear", _dense_linear, "CompositeExplicitAutograd")
torch.library.register_fake("surgery::dense_linear", _dense_linear_shape, lib=OPERATORS)
