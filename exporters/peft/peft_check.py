"""What PEFT makes of an adapter against the model it stands for: each weight's change, and the outputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from exporters.peft.layers import ADVICE, PeftTarget, delta_of
from exporters.peft.low_rank import LowRankProduct
from exporters.shared.failures import run_on_examples
from exporters.shared.functional import Function
from passes.infra.tolerance import RELATIVE, relative_error
from passes.ir.forward_context import Call, copied, state_kept
from passes.ir.torch_internals import tree_iter
from surgery.errors import ExportError
from surgery.modules.adapter import Adapter

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def outputs_of(model: nn.Module, call: Call) -> list[torch.Tensor]:
    """All tensors that a model gives, without gradients.

    Raises:
        InputError: it does not run on the inputs.
    """
    with state_kept(model), torch.no_grad():
        return _tensors(run_on_examples(model, copied(call)))


def wrapped_outputs(model: nn.Module, call: Call, adapted: Mapping[PeftTarget, LoraLayer]) -> list[torch.Tensor]:
    """All tensors that a model gives which PEFT has wrapped for good.

    Raises:
        ExportError: it does not run any more, or a parameter's wrapper is never called, so that its factors are dead.
    """
    parameters = {target.name: layer for target, layer in adapted.items() if target.parameter is not None}
    called: set[str] = set()
    args, kwargs = copied(call)
    try:
        with state_kept(model), torch.no_grad():
            for name, layer in parameters.items():  # not hooks: PyTorch's encoder layers leave their fast path for them
                layer.forward = functools.partial(_noted, layer.forward, called, name)
            outputs = _tensors(model(*args, **kwargs))
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


def _noted(forward: Function, called: set[str], name: str, *args: object, **kwargs: object) -> object:
    called.add(name)
    return forward(*args, **kwargs)


def _tensors(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(output) if isinstance(leaf, torch.Tensor)]


def check_sites(
    found: Mapping[str, Adapter], adapted: Mapping[str, LoraLayer], factors: Mapping[str, LowRankProduct]
) -> None:
    """Compare the change that PEFT computes for each weight with the product of the written factors.

    Raises:
        ExportError: they differ by more than the dtype that PEFT computes in allows.
    """
    for key, site in found.items():
        delta = delta_of(adapted[key])
        expected = site.base_weight.stored(factors[key].product())
        delta = delta if delta.shape == expected.shape else delta.reshape(expected.shape)
        error = relative_error(delta, expected) if expected.any() or delta.any() else 0.0
        if not error <= (limit := RELATIVE[delta.dtype]):
            raise ExportError(
                f"site {key!r}: PEFT changes its weight by something else than was written: "
                f"relative error {error:.3g}, allowed {limit:.0e}"
            )


def output_deviation(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest output_deviation of all outputs, each relative to its own largest entry.

    Raises:
        ExportError: there are more or fewer.
    """
    if len(found) != len(expected):
        raise ExportError(f"the outputs differ: PEFT's model has {len(found)}, this one {len(expected)}")
    return max((relative_error(one, other) for one, other in zip(found, expected, strict=True)), default=0.0)
