"""What all exporters share: the report, writing aside and moving into place, a copy to work on, agreement."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from passes.capture import default_inputs, forward_call
from passes.errors import ExportError, InputError
from passes.forward import set_mode
from surgery.directory import move_files
from surgery.foreign import path_of
from surgery.hosts import shared_tensors
from surgery.verbs import sites


@dataclass(frozen=True)
class Exported:
    """What an exporter measured: largest deviation from PyTorch over the output's largest entry, and details."""

    max_error: float
    details: dict[str, Any] = field(default_factory=dict)


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
    details: dict[str, Any]


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], default_name: str | None) -> Iterator[tuple[Path, Path]]:
    """Give what to write, in a temporary folder beside the target, and the target: a file, or a directory.

    A path with the suffix of the default name is a file; any other is a directory, which must be new or empty. Without
    a default name the format is a directory.

    Raises:
        ExportError: the directory is not empty, or cannot be written.
    """
    path = path_of(path, ExportError)
    if default_name is not None and path.suffix == Path(default_name).suffix and not path.is_dir():
        target = path
    else:
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            name = "" if default_name is None else f", or a file name with {default_name!r}'s suffix"
            raise ExportError(f"{str(path)!r} must be a new or empty directory{name}")
        target = path if default_name is None else path / default_name
    made = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
            staging = Path(temporary) / "files"
            staging.mkdir()
            yield (staging if default_name is None else staging / target.name), target
    except BaseException as error:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            raise ExportError(f"cannot write {str(target)!r}: {error}; nothing was left behind") from error
        raise


def publish(written: Path, target: Path, format: str, exported: Exported) -> ExportReport:
    """Move what was written into place, all or nothing, the main file last."""
    staging, folder = (written, target) if written.is_dir() else (written.parent, target.parent)
    names = sorted((file.name for file in staging.iterdir()), key=lambda name: (name == target.name, name))
    if folder.exists():
        move_files(staging, folder, names)
    else:
        os.rename(staging, folder)
    return ExportReport(
        format, target, tuple(folder / name for name in reversed(names)), exported.max_error, exported.details
    )


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
    shared: dict[int, Any] = dict(shared_tensors(model))
    for tensor in list(shared.values()):
        if type(tensor) is nn.Parameter:
            shared[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad)
    twin = copy.deepcopy(model, shared)
    set_mode(twin, training=False)
    for site in sites(twin).values():
        site.core.coeff = site.core.coeff.clone()
    return twin


def inputs_for(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call to export with, from what was given or the model's defaults.

    Raises:
        InputError: there are none, or the model does not run on them.
    """
    if example_inputs is None:
        example_inputs = default_inputs(model)
    if example_inputs is None:
        raise InputError(f"an export of {type(model).__name__} needs example_inputs: a dict, a tuple or a tensor")
    return forward_call(example_inputs)
