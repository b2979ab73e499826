"""Residual form in place: a called site whose module holds the remainder ``W_res`` where the weight was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from passes.errors import SurgeryError
from surgery.modules.adapter import SSpaceLinear, rebuilt, remainder


@dataclass
class Base:
    """The weight that a remainder stands in for.

    Attributes:
        parameter: the weight, or None where it was dropped.
        dtype: that it has, or would have.
        order: of the module's parameters.
        shared: whether another module has it too.
        error: of what the stored tensors give back, relative to the largest entry.
        fingerprint: of the weight, where it was dropped.
        settled: False after a state dict was loaded, until the weight is known to be that of the remainder.
        cast: whether the model was cast since the weight was dropped.
    """

    parameter: nn.Parameter | None
    dtype: torch.dtype
    order: tuple[str, ...]
    shared: bool
    error: float
    fingerprint: str | None = None
    settled: bool = True
    cast: bool = False


class SSpaceResidual(SSpaceLinear):
    """A site in residual form, ``y = x W_res^T + b + (S h + delta(h)) U^T``.

    ``W_res`` is a buffer in float32 or better, also when the model is cast to a half dtype. The base weight is no
    parameter of the module: it waits on the CPU for the undoing (the parameter itself, if it was on the CPU or another
    module has it too), unless it is dropped.
    """

    form = "residual"
    W_res: torch.Tensor

    @property
    def keeps_base(self) -> bool:  # type: ignore[override]
        """Whether the base weight was kept."""
        return base_of(self).parameter is not None

    @property
    def base_error(self) -> float:
        """Of the weight that the stored tensors give back, relative to its largest entry."""
        return base_of(self).error

    @property
    def base_fingerprint(self) -> str | None:
        """Of the base weight, where it was dropped."""
        return base_of(self).fingerprint

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The frozen base weight where the module is; if it was not kept, what the factors and the remainder give."""
        return self.parameter.to(self.W_res.device)

    @property
    def parameter(self) -> torch.Tensor:
        """The base weight where it waits."""
        base = base_of(self)
        if not base.settled:
            self._settle(base)
        return rebuilt(self.W_res, self, base.dtype) if base.parameter is None else base.parameter

    def _settle(self, base: Base) -> None:
        """After a state dict was loaded: the weight is that of the remainder."""
        base.settled = True
        if base.parameter is not None and not torch.equal(remainder(self), self.W_res):
            found = rebuilt(self.W_res, self, base.dtype).to(base.parameter.device)
            base.parameter = nn.Parameter(found, requires_grad=False)

    def chosen(self, x: torch.Tensor) -> str:
        """There is one lowering of this form."""
        return "residual"

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Let the weight be tied to what it is, as ``tie_weights`` does; refuse another."""
        if name != "weight":
            super().register_parameter(name, param)
        elif param is not base_of(self).parameter:
            raise SurgeryError("the weight of a site in residual form cannot be replaced: undo surgery or merge first")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        base_of(self).settled = False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        base, W_res = base_of(self), self.W_res
        super()._apply(fn, recurse)
        before, base.dtype = base.dtype, fn(W_res.new_empty(0, dtype=base.dtype)).dtype
        if base.parameter is not None and base.dtype != before:  # the remainder of the weight as it is now
            if base.parameter.dtype != base.dtype:  # of a shared one, the other module may have cast it already
                base.parameter.data = base.parameter.detach().to(base.dtype)
            self.W_res = remainder(self)
            return self
        base.cast |= base.dtype != before
        kept = self.W_res if W_res.is_meta else W_res.to(self.factors.U.device)
        self.W_res = kept.to(torch.promote_types(base.dtype, torch.float32))
        return self

    def drop_base(self, fingerprint: str) -> None:
        """Let go of the base weight, unless another module has it; files know it by the fingerprint."""
        base = base_of(self)
        if not base.shared:
            base.parameter, base.fingerprint = None, fingerprint


def base_of(site: SSpaceResidual) -> Base:
    """What is kept of the base of a site."""
    return vars(site)["_base"]  # type: ignore[no-any-return]


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
    vars(site)["_base"] = Base(kept, weight.dtype, tuple(site._parameters), shared, float(error))
    site.register_buffer("W_res", W_res)
    del site._parameters["weight"]
    site.__class__ = SSpaceResidual


def join(site: SSpaceResidual) -> None:
    """Put the weight back in its place; the site is in delta form."""
    weight, order = site.parameter, base_of(site).order
    if not isinstance(weight, nn.Parameter) or weight.device != site.W_res.device:
        weight = nn.Parameter(weight.detach().to(site.W_res.device), requires_grad=False)
    del site._buffers["W_res"], vars(site)["_base"]
    site.__class__ = SSpaceLinear  # type: ignore[assignment]
    parameters = {**site._parameters, "weight": weight}
    site._parameters.clear()
    site._parameters.update({name: parameters[name] for name in order})


def shared_tensors(model: nn.Module) -> dict[int, torch.Tensor]:
    """Every tensor of a model by identity, as the memo of a ``deepcopy`` that shares them."""
    bases = [site.parameter for site in model.modules() if isinstance(site, SSpaceResidual) and site.keeps_base]
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *bases)}
