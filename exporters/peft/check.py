"""What PEFT makes of an adapter against the model it stands for: each weight's change, and the outputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from exporters.peft.layers import ADVICE, Place, delta_of
from exporters.peft.low_rank import LowRank
from passes.errors import InputError
from passes.infra.tolerance import RELATIVE, relative_error
from passes.ir.forward_context import Call, copied
from passes.ir.torch_internals import tree_iter
from surgery.errors import ExportError
from surgery.modules.adapter import SSpaceLinear, of_weight


def outputs_of(model: nn.Module, call: Call) -> list[torch.Tensor]:
    """All tensors that a model gives, without gradients.

    Raises:
        InputError: it does not run on the inputs.
    """
    try:
        return _run(model, call)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"the model does not run on the example inputs: {reason}") from error


def wrapped_outputs(model: nn.Module, call: Call, adapted: Mapping[Place, Any]) -> list[torch.Tensor]:
    """All tensors that a model gives which PEFT has wrapped for good.

    Raises:
        ExportError: it does not run any more, or a parameter's wrapper is never called, so that its factors are dead.
    """
    parameters = {place.name: layer for place, layer in adapted.items() if place.parameter is not None}
    called: set[str] = set()
    for name, layer in parameters.items():  # not by hooks: PyTorch's encoder layers leave their fast path for them
        layer.forward = functools.partial(_noted, layer.forward, called, name)
    try:
        outputs = _run(model, call)
    except Exception as error:
        whose = ", ".join(sorted(parameters)) or "of modules"
        what = f"{type(error).__name__}: {error}"
        raise ExportError(f"the model does not run with PEFT's wrappers ({whose}): {what}; {ADVICE}") from error
    if dead := sorted(set(parameters) - called):
        raise ExportError(
            f"PEFT's wrapper of {', '.join(dead)} is never called on the example inputs, since the weight is read "
            f"without its module: the factors would have no effect; {ADVICE}"
        )
    return outputs


def _noted(forward: Any, called: set[str], name: str, *args: Any, **kwargs: Any) -> Any:
    called.add(name)
    return forward(*args, **kwargs)


def _run(model: nn.Module, call: Call) -> list[torch.Tensor]:
    args, kwargs = copied(call)
    with torch.no_grad():
        return [leaf for leaf in tree_iter(model(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]


def check_sites(found: Mapping[str, SSpaceLinear], adapted: Mapping[str, Any], factors: Mapping[str, LowRank]) -> None:
    """Compare the change that PEFT computes for each weight with the product of the written factors.

    Raises:
        ExportError: they differ by more than the dtype that PEFT computes in allows.
    """
    for key, site in found.items():
        delta = delta_of(adapted[key])
        expected = of_weight(factors[key].product(), site.layout, site.weight.shape)
        delta = delta if delta.shape == expected.shape else delta.reshape(expected.shape)
        error = relative_error(delta, expected) if expected.any() or delta.any() else 0.0
        if not error <= (limit := RELATIVE[delta.dtype]):
            raise ExportError(
                f"site {key!r}: PEFT changes its weight by something else than was written: "
                f"relative error {error:.3g}, allowed {limit:.0e}"
            )


def deviation(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest deviation of all outputs, each relative to its own largest entry.

    Raises:
        ExportError: there are more or fewer.
    """
    if len(found) != len(expected):
        raise ExportError(f"the outputs differ: PEFT's model has {len(found)}, this one {len(expected)}")
    return max((relative_error(one, other) for one, other in zip(found, expected, strict=True)), default=0.0)
