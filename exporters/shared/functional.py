"""A model as a function of its inputs and of some of its own tensors, which is how an exported program sees it.

The coefficient that steers, and an adapter's core, are to be inputs or buffers of a program, while the model reads them
from inside. ``torch.func.functional_call`` puts tensors in their place for one call, by one mapping from names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from surgery.modules.steering import Steering

Function = Callable[..., Any]  # a model's forward, whatever it takes
COEFF = "coeff"  # the name of the coefficient in every program


def coefficient_names(model: nn.Module) -> list[str]:
    """Names of the buffers that steer a model, one for each root in it; a shared module counts once."""
    return [f"{path}.{COEFF}" for path, module in model.named_modules() if isinstance(module, Steering)]


class FunctionalModel:
    """Calls a model with other tensors in place of its own.

    Args:
        forward: what to call; the model itself by default, or its forward where that is about to be replaced.
    """

    def __init__(self, model: nn.Module, forward: Function | None = None) -> None:
        self._body = _Body(model, model if forward is None else forward)

    def __call__(self, tensors: Mapping[str, torch.Tensor], /, *args: object, **kwargs: object) -> object:
        """Call it with tensors by the names of the model's parameters and buffers."""
        named = {f"model.{name}": tensor for name, tensor in tensors.items()}
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]  # which functional_call refuses
            return self._traced(named, *args, **kwargs)
        return torch.func.functional_call(self._body, named, args, kwargs, tie_weights=False)

    def _traced(self, tensors: Mapping[str, torch.Tensor], *args: object, **kwargs: object) -> object:
        """The same where the names are of buffers that were taken away."""
        owners = [(self._body.get_submodule(path), name) for path, _, name in (n.rpartition(".") for n in tensors)]
        for (owner, name), tensor in zip(owners, tensors.values(), strict=True):
            owner._buffers[name] = tensor
        try:
            return self._body(*args, **kwargs)
        finally:
            for owner, name in owners:
                owner._buffers[name] = None


class _Body(nn.Module):
    """What ``functional_call`` calls: a model below, and a function beside it that is not registered again."""

    def __init__(self, model: nn.Module, call: Function) -> None:
        super().__init__()
        self.model = model
        self.call = (call,)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.call[0](*args, **kwargs)


class CalledGraph(nn.Module):
    """Calls a graph module, since ``torch.export`` interprets one that it is given and passes its ``forward`` by."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = False

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.inner(*args, **kwargs)


def set_forward(model: nn.Module, forward: Function, names: Iterable[str], kind: inspect._ParameterKind) -> None:
    """Replace the forward of a working copy by one with exactly these arguments: exporters read its signature.

    Args:
        kind: of all arguments, as ``inspect.Parameter.KEYWORD_ONLY``.
    """
    parameters = [inspect.Parameter(name, kind) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    vars(model)["forward"] = forward
