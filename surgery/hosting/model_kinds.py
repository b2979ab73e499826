"""What can be operated on: modules in place, graph modules in their graph, and what is first made a graph module."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from passes.capture.capture import forward_call
from passes.errors import CaptureError, InputError
from passes.ir.forward_context import ExampleInputs, state_kept
from passes.ir.torch_internals import module_of_script


def as_module(model: object, example_inputs: ExampleInputs | None) -> nn.Module:
    """A module that can be operated on: the module itself, or a new ``GraphModule`` of what has no rewritable graph.

    Raises:
        InputError: it is no model.
        CaptureError: a TorchScript module cannot be converted, or lacks example inputs.
    """
    if isinstance(model, ExportedProgram):
        return private_parameters(model.module())
    if isinstance(model, torch.jit.ScriptModule):
        return private_parameters(_from_script(model, example_inputs))
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be an nn.Module or an ExportedProgram, not {type(model).__name__}")
    return model


def _from_script(model: torch.jit.ScriptModule, example_inputs: ExampleInputs | None) -> fx.GraphModule:
    if example_inputs is None:
        raise CaptureError("a TorchScript module needs example_inputs to be converted to a graph")
    args, kwargs = forward_call(example_inputs)
    try:
        with state_kept(model):
            return module_of_script(model, args, kwargs)
    except Exception as error:  # the converter covers a part of TorchScript and fails in many ways
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise CaptureError(f"the TorchScript module cannot be converted: {type(error).__name__}: {reason}") from error


def private_parameters(model: fx.GraphModule) -> fx.GraphModule:
    """Give a graph module parameter objects of its own over the same memory: its flags are then its own too."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                alias = made.setdefault(
                    id(parameter), nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                )
                module._parameters[name] = alias
    return model
