"""Everything that leaves PyTorch eager. One file per format, found by its name (``formats/onnx.py`` is "onnx").

from exporters import export
export(model, "onnx", "model.onnx", mode="live")
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from typing import Any

from torch import nn

from exporters import formats as _formats
from exporters.checkpoint.merge import merge_checkpoint
from exporters.compile import compiled
from exporters.onnx.cores import check_core, export_core
from exporters.program.swap import swap
from exporters.shared.publish import publish, staged
from exporters.shared.report import Exported, ExportReport
from surgery.errors import ExportError
from surgery.hosting.transaction import transaction
from surgery.verbs.apply import unwrap

__all__ = [
    "ExportError",
    "ExportReport",
    "Exported",
    "check_core",
    "compiled",
    "export",
    "export_core",
    "formats",
    "merge_checkpoint",
    "swap",
]


def formats() -> list[str]:
    """Names of the formats that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(_formats.__path__))


def export(
    model: nn.Module, format: str, path: str | os.PathLike[str], *, example_inputs: Any = None, **options: Any
) -> ExportReport:
    """Export a model, operated on or plain; the model is not changed, and nothing is left behind on failure.

    Args:
        format: one of :func:`formats`.
        path: a file, or a directory that is new or empty.
        example_inputs: dict, tuple or tensor; ``transformers`` models have defaults.
        options: those of the format, see its ``write``.

    Returns:
        Where it is, which files it has, and the error that was measured against PyTorch.

    Raises:
        ExportError: unknown format or option, a missing package, or a result that does not agree with the model.
    """
    if not isinstance(unwrap(model), nn.Module):
        raise ExportError(f"an nn.Module is exported, found {type(model).__name__}")
    if not isinstance(format, str) or format not in formats():
        raise ExportError(f"unknown format {format!r:.80} (known: {', '.join(formats())})")
    exporter = importlib.import_module(f"exporters.formats.{format}")
    known = list(inspect.signature(exporter.write).parameters)[3:]
    if unknown := sorted(set(options) - set(known)):
        raise ExportError(f"format {format!r} has no option {', '.join(unknown)} (known: {', '.join(known)})")
    model = unwrap(model)
    with staged(path, exporter.DEFAULT_NAME) as (written, target):
        with transaction(model):  # an exporter works on a copy that shares the model's tensors
            exported = exporter.write(model, written, example_inputs, **options)
        return publish(written, target, format, exported)
