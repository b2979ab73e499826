"""Everything that leaves PyTorch eager. One file per format, found by its name (``formats/onnx.py`` is "onnx").

    from exporters import export
    export(model, "onnx", "model.onnx", mode="live")

To add a format, add one file to ``exporters/formats``, with three names (:class:`exporters.shared.exporter.Exporter`)::

    DEFAULT_NAME = "model.xyz"          # of its file; None where the format is a folder

    @dataclass(frozen=True)
    class Options:                      # the flags of ``surgery export`` and all checks follow from the fields
        level: int = option(3, "how hard to squeeze")

    def write(model, path, example_inputs, options: Options) -> Exported: ...

No list is edited: ``export``, ``surgery export`` and the contract tests find the file; ``formats/pt2.py`` is the one to
copy from.
"""

from __future__ import annotations

import importlib
import os

from torch import nn

from exporters.checkpoint.merge_folder import merge_checkpoint
from exporters.compile import compiled
from exporters.onnx.cores import check_core, export_core
from exporters.program.swap import swap
from exporters.shared.export_report import Exported, ExportReport
from exporters.shared.exporter import parsed_options
from exporters.shared.publish import publish, staged
from surgery.errors import ExportError
from surgery.hosting.root import roots_of
from surgery.hosting.state import adapters_of, check_weights, unwrap
from surgery.hosting.transaction import transaction

importlib.import_module("exporters.formats")  # now: the first import of it gives its name to this package
from exporters.shared.exporter import formats  # noqa: E402

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


def export(
    model: nn.Module,
    format: str,
    path: str | os.PathLike[str],
    *,
    example_inputs: object = None,
    core: str | None = None,
    base_model: str | None = None,
    tokenizer: object = None,
    **options: object,
) -> ExportReport:
    """Export a model, operated on or plain; the model is not changed, and nothing is left behind on failure.

    Args:
        format: one of :func:`formats`.
        path: a file, or a directory that is new or empty.
        example_inputs: dict, tuple or tensor; ``transformers`` models have defaults.
        core: the core to export; None for the one that the model has.
        base_model: the hub id or folder of the base model, of formats that name it.
        tokenizer: a tokenizer or processor to save along, of formats that hold one.
        options: those of the format: the fields of ``Options`` in its file.

    Returns:
        Where it is, which files it has, and the error that was measured against PyTorch.

    Raises:
        ExportError: unknown format or option, a missing package, or a result that does not agree with the model.
    """
    if not isinstance(unwrap(model), nn.Module):
        raise ExportError(f"an nn.Module is exported, found {type(model).__name__}")
    if core is not None:
        raise ExportError(f"core={core!r:.80}: a model has one core so far, and that is exported; leave core out")
    shared = {"base_model": base_model, "tokenizer": tokenizer}
    exporter, parsed = parsed_options(
        format, {**options, **{name: value for name, value in shared.items() if value is not None}}
    )
    model = unwrap(model)
    if adapters_of(model):
        for root in roots_of(model):  # of a part by itself, the coefficient would be a constant
            check_weights(adapters_of(root))
    with staged(path, exporter.DEFAULT_NAME) as (written, target):
        with transaction(model):  # an exporter works on a copy that shares the model's tensors
            exported = exporter.write(model, written, example_inputs, parsed)
        return publish(written, target, format, exported)
