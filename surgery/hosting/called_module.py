"""A linear module that is called: its class becomes a subclass whose forward adds the adapter's term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from passes.errors import SurgeryError
from passes.ir.linear_modules import layout_of_forward
from passes.ir.torch_internals import Convolution
from surgery.errors import WeightError
from surgery.hosting.subclasses import Pickles, put_on, take_off
from surgery.modules.host import Host
from surgery.modules.outside_read import outside_read

if TYPE_CHECKING:
    from surgery.modules.adapter import Adapter

ATTRIBUTE = "sspace"


class Called(Pickles):
    """Mixin of a module whose adapter stands under ``sspace``."""

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """The output of the site, (..., d_out) for an input (..., d_in)."""
        site: Adapter | None = self._modules.get(ATTRIBUTE)  # type: ignore[attr-defined]
        if site is None:  # taken off, while somebody who wrapped this method still holds it
            return type(self).forward(self, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        forward: Callable[..., torch.Tensor] = super().forward  # type: ignore[misc]
        host = site.host
        before, host.entered = host.entered, True
        try:
            return site.lower(x, lambda: forward(*args, **kwargs))
        finally:
            host.entered = before

    @property
    @torch.jit.unused  # type: ignore[untyped-decorator]
    def weight(self) -> torch.Tensor:
        """The base weight; to others that read it while the model runs, with the change that the adapter makes."""
        weight: torch.Tensor | None = self._parameters.get("weight")  # type: ignore[attr-defined]
        if weight is None:
            weight = vars(self).get("weight")
        if weight is None:  # a property of the user's class, or none: nn.Module says so
            weight = super().weight  # type: ignore[misc]
        site: Adapter | None = self._modules.get(ATTRIBUTE)  # type: ignore[attr-defined]
        if site is None or site.host.entered or weight.is_meta or not site.runs():  # type: ignore[union-attr]
            return weight  # type: ignore[return-value]
        if type(weight) not in (torch.Tensor, nn.Parameter):  # FSDP looks for its shards while the model runs
            return weight  # type: ignore[return-value]
        return outside_read(site, weight)  # type: ignore[arg-type]

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        vars(self)["weight"] = value  # as pruning does, which has taken the parameter off

    @weight.deleter
    def weight(self) -> None:
        if "weight" not in vars(self):
            raise AttributeError("weight")
        del vars(self)["weight"]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[misc]
        self._modules[ATTRIBUTE].converted()  # type: ignore[attr-defined]
        return self


class CalledResidual(Called):
    """Mixin of a module whose weight is replaced by the remainder ``W_res``, which its adapter holds.

    The base weight is no parameter of the module: it waits on the CPU for the undoing (the parameter itself, if it was
    on the CPU or another module has it too), unless it was dropped.
    """

    @property  # type: ignore[misc]
    def weight(self) -> torch.Tensor:
        """The base weight where the module is; if it was not kept, what the factors and the remainder give."""
        site: Adapter = self.sspace  # type: ignore[attr-defined]
        return site.weight if site.host.entered or not site.runs() else outside_read(site, site.weight)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Let the weight be tied to what it is, as ``tie_weights`` does; refuse another."""
        host = self.sspace.host  # type: ignore[attr-defined]
        if name != "weight":
            super().register_parameter(name, param)  # type: ignore[misc]
        elif param is not host.set_aside:
            raise SurgeryError("the weight of a site in residual form cannot be replaced: undo surgery or merge first")

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        self.sspace.host.finalised = False  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        site: Adapter = self.sspace  # type: ignore[attr-defined]
        host: Any = site.host
        before, W_res = host.weight_dtype, site.get_buffer("W_res")
        super()._apply(fn, recurse)  # type: ignore[misc]
        host.converted(fn, before, W_res)
        site.record.converted(site, host.registered())
        return self


class CalledModule(Host):
    """Host of an adapter on a module that is called."""

    name = in_place = "module"

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner, "weight", None if owner._parameters.get("bias") is None else "bias")
        self.exact = layout_of_forward(type(owner).forward) is not None
        self.convolves = isinstance(owner, Convolution)

    def parameter(self) -> torch.Tensor:
        """The base weight."""
        weight = self.owner._parameters.get("weight")
        if weight is not None:
            return weight
        before, self.entered = self.entered, True  # what a parametrisation gives, without the adapter's change
        try:
            return self.owner.weight  # type: ignore[return-value]
        finally:
            self.entered = before

    def bias(self) -> torch.Tensor | None:
        """The base bias."""
        return self.owner._parameters["bias"] if "bias" in self.owner._parameters else getattr(self.owner, "bias", None)

    def attach(self, adapter: Adapter) -> None:
        """Put an adapter on the module."""
        self.owner._modules[ATTRIBUTE] = adapter
        put_on(self.owner, Called)

    def detach(self) -> None:
        """Take it off."""
        take_off(self.owner, Called)
        del self.owner._modules[ATTRIBUTE]

    def put_weight(self, weight: torch.Tensor) -> None:
        """Take it off, and give the module a new weight.

        Raises:
            WeightError: the module was parametrised or pruned since surgery, so that its weight is computed.
        """
        adapter: Adapter = self.owner._modules[ATTRIBUTE]  # type: ignore[assignment]
        if adapter.form == "delta" and self.registered() is None:
            raise WeightError(
                f"site {adapter.key!r}: its weight was parametrised or pruned since surgery, and is computed from "
                "other tensors; take that off first (remove_parametrizations, prune.remove)"
            )
        requires_grad = self.parameter().requires_grad
        self.detach()
        self.owner._parameters["weight"] = nn.Parameter(weight, requires_grad=requires_grad)


class ResidualModule(CalledModule):
    """Host of an adapter in residual form.

    Attributes:
        shared: whether another module has the weight too.
        finalised: False after a state dict was loaded, until the weight is known to be that of the remainder.
    """

    def __init__(self, owner: nn.Module, *, shared: bool) -> None:
        super().__init__(owner)
        weight = owner._parameters["weight"]
        assert weight is not None
        self.shared = shared
        self.set_aside = (
            weight if shared or weight.device.type == "cpu" else nn.Parameter(weight.cpu(), requires_grad=False)
        )
        self.dtype, self.finalised = weight.dtype, True

    @property
    def adapter(self) -> Adapter:
        """The adapter on the module."""
        return self.owner._modules[ATTRIBUTE]  # type: ignore[return-value]

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype that the base weight has, or would have."""
        return self.dtype

    def parameter(self) -> torch.Tensor:
        """The base weight, on the device of the remainder."""
        if ATTRIBUTE not in self.owner._modules:  # not attached yet
            assert self.set_aside is not None
            return self.set_aside
        if not self.finalised:
            self._finalise()
        if self.set_aside is None:
            return self.adapter.rebuilt_weight(self.dtype)
        return self.set_aside.to(self.adapter.get_buffer("W_res").device)

    def _finalise(self) -> None:
        """After a state dict was loaded: the weight is that of the remainder."""
        from surgery.modules.remainder import remainder

        self.finalised = True
        site = self.adapter
        if self.set_aside is not None and not torch.equal(remainder(site), site.get_buffer("W_res")):
            weight = site.rebuilt_weight(self.dtype).to(self.set_aside.device)
            self.set_aside = nn.Parameter(weight, requires_grad=False)

    def place(self) -> tuple[Mapping[str, torch.Tensor | None], str]:
        """The base parameter is set aside."""
        return vars(self), "set_aside"

    def converted(self, fn: Callable[[torch.Tensor], torch.Tensor], before: torch.dtype, W_res: torch.Tensor) -> None:
        """Follow a conversion of the model: the remainder stays in float32 or better."""
        from surgery.modules.remainder import remainder

        site = self.adapter
        self.dtype = fn(W_res.new_empty(0, dtype=before)).dtype
        if self.set_aside is not None and self.dtype != before:  # the remainder of the weight as it is now
            if self.set_aside.dtype != self.dtype:  # of a shared one, the other module may have cast it already
                self.set_aside.data = self.set_aside.detach().to(self.dtype)
            site.W_res = remainder(site)
            return
        self.cast |= self.dtype != before
        moved = site.get_buffer("W_res") if W_res.is_meta else W_res.to(site.device)
        site.W_res = moved.to(torch.promote_types(self.dtype, torch.float32))

    def attach(self, adapter: Adapter) -> None:
        """Put an adapter on the module, its remainder in the weight's place."""
        self.owner._modules[ATTRIBUTE] = adapter
        adapter.base_weight.reader = CalledModule(self.owner)  # while the weight is there
        self.base_error = adapter.split()
        adapter.base_weight.reader = self
        del self.owner._parameters["weight"]
        put_on(self.owner, CalledResidual)

    def detach(self) -> None:
        """Take it off, and put the weight back in its place."""
        weight: torch.Tensor = self.parameter()
        if self.set_aside is not None and self.set_aside.device == weight.device:
            weight = self.set_aside
        parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach(), requires_grad=False)
        take_off(self.owner, CalledResidual)
        del self.owner._modules[ATTRIBUTE]
        parameters = {**self.owner._parameters, "weight": parameter}
        self.owner._parameters.clear()
        self.owner._parameters.update({name: parameters[name] for name in self.order})

    def drop_base(self, fingerprint: str) -> None:
        """Let go of the base weight, unless another module has it; files know it by the fingerprint."""
        if not self.shared:
            self.set_aside, self.keeps_base, self.base_fingerprint = None, False, fingerprint
