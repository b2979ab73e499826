"""What was trained beside the cores, as PEFT holds it: whole modules (``modules_to_save``), biases of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from exporters.peft.layers import ADAPTER, ADVICE, PeftTarget
from surgery.errors import ExportError
from surgery.hosting.beside_cores import beside_cores

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class BesideCores:
    """Parameters that are to be in a PEFT adapter as they are.

    Attributes:
        values: by the names that they have without adapters.
        modules: names of the modules that PEFT copies and saves whole.
        biases: names of those that are biases of modules that PEFT wraps; it saves those of all such modules then.
    """

    values: Mapping[str, torch.Tensor]
    modules: tuple[str, ...]
    biases: tuple[str, ...]

    def put_into(self, wrapped: PeftModel) -> None:
        """Give PEFT's copies and layers the values."""
        inner = wrapped.get_base_model()
        for name, value in self.values.items():
            path, _, local = name.rpartition(".")
            owner = inner.get_submodule(path)
            held = owner.get_base_layer() if name in self.biases else owner.modules_to_save[ADAPTER]
            _put(held, local, value.detach().clone())

    def clear_in(self, base: nn.Module) -> None:
        """Take the values out of a base model, so that what PEFT computes has them from the file."""
        for name, value in self.values.items():
            path, _, local = name.rpartition(".")
            _put(base.get_submodule(path), local, torch.zeros_like(value))


def _put(owner: nn.Module, local: str, value: torch.Tensor) -> None:
    if local in owner._buffers:
        owner._buffers[local] = value
    else:
        owner._parameters[local] = nn.Parameter(value, requires_grad=False)


def kept_whole(model: nn.Module, targets: Iterable[PeftTarget]) -> BesideCores:
    """What was trained beside the cores of a model, and where PEFT has a place for it.

    Raises:
        ExportError: it has none.
    """
    targets = list(targets)
    wrapped = {target.module for target in targets}
    values = {name: parameter.detach() for name, parameter in beside_cores(model).items()}
    modules, biases, refused = set(), [], {}
    for name in values:
        owner, _, local = name.rpartition(".")
        if not owner:
            refused[name] = "it is a parameter of the model itself, and PEFT saves modules inside a model"
        elif PeftTarget(owner) in targets:
            if local == "bias":
                biases.append(name)
            else:
                refused[name] = "it is the weight that PEFT adds the factors to"
        elif inside := sorted(path for path in wrapped if path == owner or path.startswith(f"{owner}.")):
            refused[name] = f"PEFT would have to save its module whole, which holds the site {inside[0]!r}"
        else:
            modules.add(owner)
    if refused:
        why = "; ".join(f"{name!r}: {reason}" for name, reason in refused.items())
        raise ExportError(f"{len(refused)} parameters were trained beside the cores and have no place in PEFT ({why}); "
                          f"{ADVICE}")  # fmt: skip
    return BesideCores(values, tuple(sorted(modules)), tuple(biases))
