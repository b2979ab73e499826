"""Tensors of the adapter that become inputs of an ONNX graph: the coefficient, and the core."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn

from exporters.onnx.cores import core_slots
from exporters.shared.functional import COEFF, coefficient_names
from surgery.verbs.steer import sites


@dataclass(frozen=True)
class AdapterInput:
    """A tensor of the adapter that becomes an input of the graph, with its value as the default.

    Attributes:
        name: of the input.
        default: what holds where the input is left out.
        example: what it is captured with; no special values, which a rule of the optimiser might remove.
        tensors: names in the model of the tensors that it takes the place of.
        shape: to give it there; None as it is.
        spread: give it as many entries as the batch has rows.
    """

    name: str
    default: torch.Tensor
    example: torch.Tensor
    tensors: tuple[str, ...]
    shape: tuple[int, ...] | None = None
    spread: bool = False

    def mapping(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """A value by the names of what it takes the place of."""
        return dict.fromkeys(self.tensors, value if self.shape is None else value.reshape(self.shape))


def coefficient_input(model: nn.Module, rows: int) -> AdapterInput:
    """``coeff``: a number or one per row; 1.0 by default. It takes the place of every site's own.

    Args:
        rows: of the batch, where each can have a coeff of its own. It is then spread over them before anything is
            computed with it: what a number makes is inferred to be one number, and would lie in memory as such.
    """
    names = coefficient_names(model)
    dtypes = (model.get_buffer(name).dtype for name in names)
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    # a site that is read as a weight takes a number; such a model has no rows
    shape = () if any(site.host.name == "weight" for site in sites(model).values()) else None
    example = torch.ones(1, dtype=dtype)
    return AdapterInput(COEFF, torch.ones((), dtype=dtype), example, tuple(names), shape, rows > 1)


def core_inputs(model: nn.Module) -> list[AdapterInput]:
    """Every core tensor under the name that :func:`core_slots` gives it."""
    paths = {id(module): path for path, module in model.named_modules()}
    inputs = []
    for name, slot in core_slots(model).items():
        value, shape = slot.value(), tuple(slot.core.tensors()[slot.local].shape)
        example = torch.linspace(0.3, 0.7, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
        inputs.append(AdapterInput(name, value, example, (f"{paths[id(slot.core)]}.{slot.local}",), shape))
    return inputs
