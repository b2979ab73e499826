"""Residual form in place: a called site whose module holds the remainder ``W_res`` where the weight was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from surgery.adapter import SSpaceLinear, rebuilt, remainder
from surgery.fingerprint import fingerprint


class SSpaceResidual(SSpaceLinear):
    """A site in residual form, ``y = x W_res^T + b + (S h + delta(h)) U^T``.

    ``W_res`` is a buffer in float32 or better, also when the model is cast to a half dtype. The base weight is no
    parameter of the module: it waits on the CPU for the undoing (the parameter itself, if it was on the CPU or another
    module has it too), unless it is dropped.

    Attributes:
        keeps_base: whether the base weight was kept.
        base_error: of the weight that the stored tensors give back, relative to its largest entry.
        base_fingerprint: of the base weight, where it was dropped.
    """

    form = "residual"
    W_res: torch.Tensor
    base_error: float
    base_fingerprint: str | None = None

    @property
    def keeps_base(self) -> bool:  # type: ignore[override]
        """Whether the base weight was kept."""
        return vars(self)["base"] is not None

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The frozen base weight; where it was not kept, what the factors and the remainder give."""
        base: torch.Tensor | None = vars(self)["base"]
        return rebuilt(self.W_res, self, vars(self)["weight_dtype"]) if base is None else base

    def chosen(self, x: torch.Tensor) -> str:
        """There is one lowering of this form."""
        return "residual"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before, base, W_res = vars(self)["weight_dtype"], vars(self)["base"], self.W_res
        super()._apply(fn, recurse)
        dtype = vars(self)["weight_dtype"] = fn(W_res.new_empty(0, dtype=before)).dtype
        if base is not None and dtype != before:  # the remainder of the weight as it is now
            vars(self)["base"] = nn.Parameter(base.detach().to(dtype), requires_grad=base.requires_grad)
            self.W_res = remainder(self)
        else:
            self.W_res = W_res.to(self.factors.U.device, torch.promote_types(dtype, torch.float32))
        return self

    def drop_base(self) -> None:
        """Let go of the base weight; its fingerprint is kept, by which an adapter file knows its model."""
        self.base_fingerprint = fingerprint(self.weight)
        vars(self)["base"] = None


def split(site: nn.Module, *, shared: bool) -> None:
    """Put the remainder of a site's weight in the weight's place.

    Args:
        site: called, and in delta form.
        shared: whether another module has the weight too, so that it stays where it is.
    """
    assert isinstance(site, SSpaceLinear)
    weight, W_res = site._parameters["weight"], remainder(site)
    assert weight is not None
    W = weight.detach().to(torch.float64)
    error = (rebuilt(W_res, site, weight.dtype).to(torch.float64) - W).abs().max() / W.abs().max().clamp(1e-300)
    kept = weight if shared or weight.device.type == "cpu" else nn.Parameter(weight.cpu(), requires_grad=False)
    state = {"base": kept, "weight_dtype": weight.dtype, "order": tuple(site._parameters), "base_error": float(error)}
    vars(site).update(state)
    del site._parameters["weight"]
    site.__class__ = SSpaceResidual
    site.register_buffer("W_res", W_res)


def join(site: SSpaceResidual) -> None:
    """Put the weight back in its place; the site is in delta form."""
    weight, order = site.weight, vars(site)["order"]
    if not isinstance(weight, nn.Parameter) or weight.device != site.W_res.device:
        weight = nn.Parameter(weight.detach().to(site.W_res.device), requires_grad=False)
    del site._buffers["W_res"]
    for name in ("base", "weight_dtype", "order", "base_error", "base_fingerprint"):
        vars(site).pop(name, None)
    site.__class__ = SSpaceLinear  # type: ignore[assignment]
    parameters = {**site._parameters, "weight": weight}
    site._parameters.clear()
    site._parameters.update({name: parameters[name] for name in order})
