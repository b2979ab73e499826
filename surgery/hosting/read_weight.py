"""A weight that its owner reads without calling a module: the adapter becomes a parametrisation, ``W -> W + dW``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from passes.ir.torch_internals import parametrised_class
from surgery.errors import WeightError
from surgery.hosting.subclasses import bare_instance, change_class, class_and_mixins
from surgery.modules.adapter import Adapter
from surgery.modules.host import Host


class ReadWeight(Host):
    """Host of an adapter on a weight that is read (``nn.MultiheadAttention.in_proj_weight``, a raw ``nn.Parameter``).

    Only the weight itself can be intercepted. Of a packed weight, several parts may be sites, each some rows of it.

    Attributes:
        part: "q", "k" or "v", of a packed weight.
    """

    name = in_place = "weight"
    changes_weight = True

    def __init__(self, owner: nn.Module, weight_name: str, bias_name: str | None, part: str = "") -> None:
        super().__init__(owner, weight_name, bias_name)
        self.part = part
        self.rows: tuple[int, int] | None = None

    def parameter(self) -> torch.Tensor:
        """The parameter that holds the base weight."""
        if parametrize.is_parametrized(self.owner, self.weight_name):
            return self.owner.get_parameter(f"parametrizations.{self.weight_name}.original")
        return self.owner.get_parameter(self.weight_name)

    def place(self) -> tuple[Mapping[str, torch.Tensor | None], str]:
        """The parametrisation holds it."""
        if not parametrize.is_parametrized(self.owner, self.weight_name):
            return super().place()
        return self.owner.get_submodule(f"parametrizations.{self.weight_name}")._parameters, "original"

    def bias(self) -> torch.Tensor | None:
        """The bias, of a part its entries."""
        if self.bias_name is None:
            return None
        bias: torch.Tensor = getattr(self.owner, self.bias_name)
        return bias if self.rows is None else bias[self.rows[0] : self.rows[1]]

    def attach(self, adapter: Adapter) -> None:
        """Register the adapter as a parametrisation."""
        self.adapter = adapter
        self.rows = adapter.rows
        if parametrize.is_parametrized(self.owner):
            for others in self.owner.parametrizations.values():  # type: ignore[operator,union-attr]
                for other in others:
                    if isinstance(other, Adapter):  # an earlier one, which knows the order before surgery
                        self.order = other.host.order
        new = not parametrize.is_parametrized(self.owner)
        try:
            parametrize.register_parametrization(self.owner, self.weight_name, adapter, unsafe=True)
        except (TypeError, AttributeError) as error:  # it may refuse to be subclassed, or to be given an attribute
            raise WeightError(
                f"site {adapter.key!r}: its weight is read without a call of a plain linear module, and "
                f"{type(self.owner).__name__} cannot be parametrised ({error}): leave it out with exclude_modules"
            ) from error
        _read_quickly(type(self.owner), self.weight_name)
        _told_of_conversions(type(self.owner))
        if new:
            _picklable(type(self.owner))

    def detach(self) -> None:
        """Remove the parametrisation; parameters are in the order that they had."""
        owner = self.owner
        hosted = owner.get_submodule(f"parametrizations.{self.weight_name}")
        assert isinstance(hosted, nn.ModuleList)
        if len(hosted) > 1:  # other parts of the weight
            del hosted[next(i for i, other in enumerate(hosted) if other is self.adapter)]
            if not any(isinstance(other, Adapter) for other in hosted):
                setattr(type(owner), self.weight_name, vars(type(owner))[self.weight_name].its)
            return
        _bring_back(hosted)
        cls = type(
            owner
        )  # a deep copy shares it: without a class of its own, removal would delete the original's property
        change_class(owner, type(cls)(cls.__name__, cls.__bases__, dict(vars(cls))))  # type: ignore[misc]
        parametrize.remove_parametrizations(owner, self.weight_name, leave_parametrized=False)
        for parameter in self.order:
            if parameter in owner._parameters:
                owner._parameters[parameter] = owner._parameters.pop(parameter)

    def put_weight(self, weight: torch.Tensor) -> None:
        """Take the adapter off, and give the owner a new weight; of a part, new rows."""
        base, name, owner = self.parameter(), self.weight_name, self.owner
        if self.rows is not None:
            start, stop = self.rows
            weight = torch.cat([base.detach()[:start], weight, base.detach()[stop:]])
        self.detach()
        parameter = nn.Parameter(weight, requires_grad=base.requires_grad)
        if parametrize.is_parametrized(owner, name):
            owner.parametrizations[name].original = parameter  # type: ignore[index,operator,union-attr]
        else:
            owner._parameters[name] = parameter


def _bring_back(module: nn.Module) -> None:
    """Undo what accelerate's offloading has done to a module that is about to go, with the weight in it."""
    if "_hf_hook" in vars(module):
        sys.modules["accelerate.hooks"].remove_hook_from_module(module)


class Quick(property):
    """The property of a parametrised weight, whose read is as quick as that of a parameter where the weight is cached.

    PyTorch's own takes tens of microseconds, and within ``parametrize.cached()`` it gives the weight of an old
    coefficient.

    Attributes:
        its: PyTorch's own.
    """

    def __init__(self, name: str, its: property) -> None:
        def read(owner: nn.Module) -> torch.Tensor:
            hosted: Any = owner._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
            if not torch.compiler.is_compiling() and len(hosted._modules) == 1:
                adapter, original = hosted._modules["0"], hosted._parameters["original"]
                if isinstance(adapter, Adapter) and adapter.reuses(original):
                    return adapter.forward(original)
            return hosted()  # type: ignore[no-any-return]

        super().__init__(read, its.fset)
        self.its = its


def _told_of_conversions(cls: Any) -> None:
    """Let the adapters of a parametrised module know when its weights have been moved or cast."""
    if "_apply" in vars(cls):
        return

    def apply(module: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        mine: Any = next(
            c for c in type(module).__mro__ if vars(c).get("_apply") is apply
        )  # detaching copies the class
        super(mine, module)._apply(fn, recurse)
        for parts in module.parametrizations.values():
            for part in parts:
                if isinstance(part, Adapter):
                    part.record.converted(part, part.host.registered())
        return module

    setattr(cls, "_apply", apply)  # noqa: B010


def _read_quickly(cls: type, name: str) -> None:
    its = vars(cls)[name]
    setattr(cls, name, its if isinstance(its, Quick) else Quick(name, its))


def _picklable(cls: Any) -> None:
    """Let a parametrised class that was made for an adapter be pickled whole, which ``parametrize`` refuses."""
    del cls.__getstate__

    def reduce(module: Any, protocol: object) -> tuple[object, ...]:
        hosted = [name for name, parts in module.parametrizations.items() if any(isinstance(p, Adapter) for p in parts)]
        base, mixins = class_and_mixins(type(module).__bases__[0])
        return _unpickled, (base, mixins, list(module.parametrizations), hosted), module.__getstate__()

    setattr(cls, "__reduce_ex__", reduce)  # noqa: B010


def _unpickled(cls: type, mixins: tuple[type, ...], names: list[str], hosted: list[str]) -> nn.Module:
    module = bare_instance(cls, mixins)
    assert isinstance(module, nn.Module)
    parametrised_class(module, names)
    for name in hosted:
        _read_quickly(type(module), name)
    _told_of_conversions(type(module))
    _picklable(type(module))
    return module
