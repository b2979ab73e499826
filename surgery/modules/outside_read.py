"""The weight of a called module as others read it within a call of the root: it has the adapter's change.

A loss in chunks or an attention that is fused may multiply by ``self.head.weight`` where its module is not called. What
asks such a weight for its dtype or its sizes gets those of the base, and computes nothing; any other operation is given
the changed weight, with the gradient of the core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from passes.errors import InputError, SurgeryError
from passes.ir.torch_internals import plainly, tree_map_only
from surgery.errors import VariantError, WeightError
from surgery.support.untrusted_files import JsonObject

if TYPE_CHECKING:
    from surgery.modules.adapter import Adapter

PROPERTIES = (
    "dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_leaf", "itemsize", "nbytes", "is_cuda",
    "is_cpu", "is_meta", "is_quantized", "is_sparse", "is_nested",
)  # fmt: skip
METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "get_device", "is_floating_point", "is_complex",
    "is_signed", "stride", "is_contiguous", "__len__",
)  # fmt: skip
METADATA = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in PROPERTIES] + [getattr(torch.Tensor, name) for name in METHODS]
)


class OutsideRead(torch.Tensor):
    """Stands for the changed weight of a site until an operation wants its entries."""

    site: Adapter

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: JsonObject | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in METADATA:
            return plainly(func, args, kwargs)
        if func is torch.Tensor.to and "meta" in map(str, args[1:]):  # accelerate lets go of a weight so
            return torch.empty_like(plainly(torch.Tensor.detach, args[:1], {}), device="meta")
        name = str(func.__name__)
        if name == "__set__" or name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            key = next(a.site.key for a in args if isinstance(a, OutsideRead))
            raise SurgeryError(
                f"site {key!r}: its weight is written ({name}) while the model runs, where it stands for the base "
                "weight and the adapter's change; write to it outside of the model's forward"
            )
        args, kwargs = tree_map_only(OutsideRead, lambda read: with_change(read.site), (args, kwargs))
        return func(*args, **kwargs)


def outside_read(site: Adapter, weight: torch.Tensor) -> torch.Tensor:
    """What stands for the weight of a site where its module is not called."""
    if torch.compiler.is_compiling():  # where the dtype alone is asked for, nothing is computed
        if _why_not(site) is not None:  # a product with it is refused by whatever traces
            return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        return with_change(site)
    if not site.base_weight.holds_entries:
        weight = torch.empty((), dtype=weight.dtype, device=weight.device).expand(site.base_weight.matrix_shape)
    found = weight.as_subclass(OutsideRead)
    found.site = site
    return found


def with_change(site: Adapter) -> torch.Tensor:
    """``W + dW`` in the layout of the weight, with the gradient of the core.

    Raises:
        VariantError: no weight has the effect of the adapter.
        WeightError: the weight takes no change.
        InputError: rows or tokens have coefficients of their own.
    """
    if (error := _why_not(site)) is not None:
        raise error
    weight = site.weight
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return site.changed_weight(weight)
    return site.cache.get("read", lambda one: one.changed_weight(weight.detach()))  # type: ignore[no-any-return]


def _why_not(site: Adapter) -> SurgeryError | None:
    """Why a site has no changed weight at present, or None."""
    where = f"site {site.key!r}: its weight is read without a call of its module"
    advice = "leave the site out with exclude_modules"
    if not site.variant.linear:
        return VariantError(
            f"{where}, and {site.variant.name} is not linear, so that no weight has its effect; {advice}"
        )
    if not site.base_weight.holds_entries:
        return WeightError(f"{where}, and it is quantised, so that it takes no change; {advice}")
    if site.steering.coeff.numel() > 1:
        return InputError(f"{where}, which cannot differ between the rows of a batch; set a scalar coeff, or {advice}")
    return None
