"""``dense``: one plain product with ``W + dW``, which is made once for each value of the core and of coeff.

Inference costs what the base costs. In training dx goes through the same product, and the core gets its gradient
without the d_out x d_in gradient of a weight: with ``h = x Vh^T`` and ``p = dy U`` it is that of ``<p, delta(h)>``.
That is 2 N r (d_in + d_out) FLOPs and 2 d_out d_in r for the weight, where ``lowrank`` needs 4 N r (d_in + d_out).

The kept weight is never stale. On the CPU the values of the core and coeff are compared with those it was made from, as
``.data`` may be written unnoticed; on an accelerator, where that would synchronise, version counters are, and
``surgery.refresh`` is for such writes there. Of the frozen tensors, identity and version are compared.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from surgery.lowerings import Size, Work, register
from surgery.lowerings.parts import with_gradient_of
from surgery.watching import watch

if TYPE_CHECKING:
    from surgery.adapter import SSpaceLinear

AMORTISED = 16  # forwards that one materialised weight is taken to serve in inference
COUNTER = itertools.count(1)
SITES: weakref.WeakValueDictionary[int, SSpaceLinear] = weakref.WeakValueDictionary()


@register
class Dense:
    """The materialised weight."""

    name = "dense"
    steers_rows = False

    def why_not(self, site: SSpaceLinear) -> str | None:
        """The variant is not linear."""
        return None if site.variant.linear else f"{site.variant.name} is not linear in its input: there is no weight"

    def advised(self, site: SSpaceLinear) -> bool:
        """Always."""
        return True

    def run(self, site: SSpaceLinear, x: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
        """One product; while the core is trained, with a term of value zero that has the core's gradient."""
        if not site.trains():
            if torch.compiler.is_compiling() and not torch.is_grad_enabled():
                reads = [site.weight, site.core.coeff, *site.core.parameters()]
                return torch.ops.surgery.dense_linear(x, site.handle, reads, site.factors.U.shape[0])  # type: ignore[no-any-return]
            return product(site, x, _weight(site))
        return with_gradient_of(site, product(site, x, _weight(site)), site.adapter_delta(x.detach()))

    def work(self, size: Size, *, training: bool) -> list[Work]:
        """The weight's own product, spread over several forwards in inference; in training two thin products."""
        n, d_out, d_in, r, core, item = size
        wide = max(item, 4)
        make = [Work.product(d_out, d_in, r, wide), Work.pointwise(d_out * d_in, wide, 2 if item == wide else 6)]
        if not training:
            return [Work(w.flops / AMORTISED, w.bytes / AMORTISED) for w in make]
        thin = [Work.product(n, r, d_in, item), Work.product(n, r, d_out, item), Work(6.0 * n * core, 0)]
        return [*make, *thin, Work.pointwise(n * r, item, 6)]


def _weight(site: SSpaceLinear) -> torch.Tensor:
    """The materialised weight; in compiled code that autograd may go through, made in each forward."""
    return changed(site) if torch.compiler.is_compiling() else kept_weight(site)


def product(site: SSpaceLinear, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What the base computes, with another weight."""
    if site.layout == "out_in":
        return F.linear(x, weight, site.bias)
    assert site.bias is not None  # Conv1D always has one
    return torch.addmm(site.bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


def changed(site: SSpaceLinear) -> torch.Tensor:
    """``W + U delta(Vh^T)^T`` without gradients, in the layout of the weight, formed in the core's dtype."""
    with torch.no_grad():
        factors, weight, wide = site.factors, site.weight.detach(), site.core.coeff.dtype
        D = site.core_delta(factors.Vh.T.to(wide), factors.S)  # (d_in, r)
        left, right = factors.U.to(wide), D.T
        if site.layout == "in_out":
            left, right = D, factors.U.to(wide).T
        made = torch.addmm(weight.to(wide), left, right).to(weight.dtype)
        # a weight of other strides may be multiplied by another kernel: an identity would then have other bits
        return made if made.stride() == weight.stride() else torch.empty_like(weight).copy_(made)


class Kept:
    """A materialised weight and what it was made from."""

    def __init__(self, site: SSpaceLinear) -> None:
        self.unchanged = [watch(tensor, by_value=live) for tensor, live in _sources(site)]
        self.weight = changed(site)

    def fits(self, site: SSpaceLinear) -> bool:
        """Whether the weight is what would be made now."""
        now = _sources(site)
        if len(now) != len(self.unchanged):
            return False
        return all(same(tensor) for same, (tensor, _) in zip(self.unchanged, now, strict=True))


def _sources(site: SSpaceLinear) -> list[tuple[torch.Tensor, bool]]:
    """What a weight is made from: the knob and the core, which are live, and the frozen tensors."""
    frozen = (site.weight, site.factors.U, site.factors.S, site.factors.Vh)
    live = (site.core.coeff, *site.core.tensors().values())
    return [(tensor, True) for tensor in live] + [(tensor, False) for tensor in frozen]


def kept_weight(site: SSpaceLinear) -> torch.Tensor:
    """The materialised weight of a site at the present core and coeff, made anew only if one of them has changed.

    A new tensor each time: a graph that autograd still holds may read the old one.
    """
    kept = vars(site).get("_dense")
    if kept is None or not kept.fits(site):
        vars(site).pop("_dense", None)  # before there are two
        with torch.inference_mode(False):
            kept = vars(site)["_dense"] = Kept(site)
    return kept.weight  # type: ignore[no-any-return]


def give_handle(site: SSpaceLinear) -> None:
    """Give a site the number by which compiled code finds what it keeps; a tensor, so that no graph holds its value."""
    number = next(COUNTER)
    vars(site)["handle"] = torch.tensor(number)
    SITES[number] = site


OPERATORS = torch.library.Library("surgery", "FRAGMENT")
OPERATORS.define("dense_linear(Tensor x, Tensor handle, Tensor[] reads, SymInt d_out) -> Tensor")


def _dense_linear(x: torch.Tensor, handle: torch.Tensor, reads: list[torch.Tensor], d_out: int) -> torch.Tensor:
    """The product of a site with its materialised weight; ``reads`` tells a compiler what it depends on."""
    site = SITES[int(handle)]
    with torch.no_grad():
        return product(site, x, kept_weight(site))


def _dense_linear_shape(x: torch.Tensor, handle: torch.Tensor, reads: list[torch.Tensor], d_out: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], d_out)


OPERATORS.impl("dense_linear", _dense_linear, "CompositeExplicitAutograd")
torch.library.register_fake("surgery::dense_linear", _dense_linear_shape, lib=OPERATORS)
