"""What all exporters share: the report, a copy to work on, the call to export with."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from torch import nn

from passes.capture.capture import default_inputs, forward_call
from passes.errors import InputError
from passes.ir.forward_context import Call, set_mode
from surgery.errors import ExportError
from surgery.hosting.state import shared_tensors
from surgery.support.untrusted_files import JsonObject
from surgery.verbs.steer import sites


@dataclass(frozen=True)
class Exported:
    """What an exporter measured: largest deviation from PyTorch over the output's largest entry, and details."""

    max_error: float
    details: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class ExportReport:
    """A finished export.

    Attributes:
        path: the file that was asked for, or the main file in the directory that was asked for; of a format that is a
            directory, the directory.
        files: all files written.
        max_error: largest deviation from PyTorch on the example inputs, relative to the largest output entry.
        details: of the format.
    """

    format: str
    path: Path
    files: tuple[Path, ...]
    max_error: float
    details: JsonObject


def need(package: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ExportError: it is not installed; says which extra to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(f"this needs {package}: pip install 'sspace-surgery[{extra}]'") from error


def working_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares the memory of every tensor with the model, but of ``coeff``.

    Parameters are objects of its own, so that it can be undone, merged or wrapped without a flag of the model's being
    set; their values must not be written.
    """
    shared: dict[int, object] = dict(shared_tensors(model))
    for tensor in list(shared.values()):
        if type(tensor) is nn.Parameter:
            shared[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad)
    copied = copy.deepcopy(model, shared)
    set_mode(copied, training=False)
    for steering in {site.steering for site in sites(copied).values()}:
        steering._buffers["coeff"] = steering.coeff.clone()
    return copied


def example_call(model: nn.Module, example_inputs: object) -> Call:
    """The call to export with, from what was given or the model's defaults.

    Raises:
        InputError: there are none, or the model does not run on them.
    """
    if example_inputs is None:
        example_inputs = default_inputs(model)
    if example_inputs is None:
        raise InputError(f"an export of {type(model).__name__} needs example_inputs: a dict, a tuple or a tensor")
    return forward_call(example_inputs)
