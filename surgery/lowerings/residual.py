"""``residual``: the original's own form, ``y = x W_res^T + b + (S h + delta(h)) U^T`` with ``W_res = W - U S Vh``.

It costs what ``lowrank`` costs and computes in the remainder's dtype, float32 or better. The one lowering whose
``coeff = 0`` is the base up to rounding, and not bit for bit: there to be compared with, and for a base that is not
kept. The remainder is then a buffer of the adapter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from passes.errors import InputError
from surgery.lowerings import ALWAYS, REGISTRY, Size, Work, register
from surgery.lowerings._site import Base, LinearSite


@register
class Residual:
    """The PiSSA-style split."""

    name = "residual"
    form = "residual"
    steers_rows = True
    caches = False
    takes_projection = False

    def why_not(self, site: LinearSite) -> str | None:
        """The site has its weight, and no remainder."""
        return None if site.form == "residual" else "the site is in delta form"

    def advised(self, site: LinearSite) -> bool:
        """Never by itself: what the form of a site is, is decided when it is operated on."""
        return False

    def run(self, site: LinearSite, x: torch.Tensor, base: Base) -> torch.Tensor:
        """The remainder's product and the whole term, summed in the remainder's dtype."""
        W_res = site.get_buffer("W_res")
        if not x.is_floating_point():
            raise InputError(
                f"site {site.key!r}: its input is of {x.dtype}, and a product needs floating-point numbers"
            )
        wide, factors = x.to(W_res.dtype), site.factors
        bias = None if site.bias is None else site.bias.to(W_res.dtype)
        h = F.linear(wide, factors.Vh.to(wide.dtype))
        d = h * factors.S.to(h.dtype) + site.core_delta(h, factors.S)
        y = F.linear(wide, W_res, bias) + F.linear(d, factors.U.to(wide.dtype))
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def work(self, size: Size, *, training: bool) -> list[Work]:
        """What ``lowrank`` takes beside the product, which is that of another weight."""
        return REGISTRY[ALWAYS].work(size, training=training)
