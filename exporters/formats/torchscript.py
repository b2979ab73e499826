"""TorchScript, for hosts that load nothing newer: traced, frozen, and loaded by ``torch.jit.load`` with torch alone.

TorchScript is deprecated in PyTorch, and a trace holds the one path that the example took: prefer "pt2" or "aoti"
wherever the host allows. ``sizes`` in the report says whether the program is right at another batch and sequence.

``merged``  the dense model at the present coeff.
``live``    the adapter stays in the program; its attribute ``coeff`` steers all sites, 1.0 as saved.

    program = torch.jit.load("model.pt")
    program.coeff.fill_(0.5)
    logits = program(ids)["logits"]

Inputs are taken by position or by name, in the order of the example. Outputs are tensors, tuples, or a flat dict in
place of a ``transformers`` output.
"""

from __future__ import annotations

import inspect
import io
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from exporters.program.live_program import NOISY, Mode, subject_of
from exporters.shared.agreement import compare_program, sizes
from exporters.shared.export_report import Exported
from exporters.shared.failures import type_and_message
from exporters.shared.functional import COEFF, set_forward
from exporters.shared.options import option
from exporters.shared.subject import Subject
from passes.capture.capture import keyword_inputs
from passes.errors import SurgeryError
from passes.ir.forward_context import copied, quiet, state_kept
from surgery.errors import ExportError

DEFAULT_NAME = "model.pt"
NOTE = "TorchScript is deprecated in PyTorch: use the formats 'pt2' or 'aoti' where the host can load them"


@dataclass(frozen=True)
class Options:
    """Options of the format "torchscript"."""

    mode: Mode = option("merged", "merge the adapter, or keep it in the program")


def write(model: nn.Module, path: Path, example_inputs: object, options: Options) -> Exported:
    """Trace, freeze and save; load it again, and compare it with PyTorch.

    Raises:
        ExportError: the model cannot be traced, or the program's results differ from PyTorch's.
    """
    subject = subject_of(model, example_inputs, options.mode)
    _save(_traced(subject), path)
    with quiet(*NOISY):
        loaded = torch.jit.load(str(path))
    error = compare_program(
        subject, loaded, lambda coeff: getattr(loaded, COEFF).fill_(coeff), "the TorchScript program"
    )
    details = {"mode": options.mode, "note": NOTE, "sizes": sizes(subject, loaded), "comparisons": len(subject.coeffs)}
    return Exported(error, details)


def _traced(subject: Subject) -> torch.jit.ScriptModule:
    root = subject.root
    inputs = keyword_inputs(root, copied(subject.call))
    inner = root.forward

    def forward(*args: object) -> object:
        return inner(**dict(zip(inputs, args, strict=True)))

    set_forward(root, forward, inputs, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        with torch.no_grad(), state_kept(root), quiet(*NOISY), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a trace fixes; ``sizes`` tells
            traced = torch.jit.trace(root, tuple(inputs.values()), strict=False, check_trace=False)
        with torch.no_grad(), quiet(*NOISY), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frozen: torch.jit.ScriptModule = torch.jit.freeze(traced, preserved_attrs=[COEFF] if subject.live else [])
            return frozen
    except SurgeryError:
        raise
    except Exception as error:  # a model may resist in any way; the cause is chained
        raise ExportError(f"{type(subject.reference).__name__} cannot be traced: {type_and_message(error)}") from error


def _save(program: torch.jit.ScriptModule, path: Path) -> None:
    """Save without the debugging records, which hold the paths of source files and which torch cannot leave out."""
    with quiet(*NOISY):
        whole = io.BytesIO(program.save_to_buffer())  # type: ignore[no-untyped-call]
    with zipfile.ZipFile(whole) as saved, zipfile.ZipFile(path, "w") as written:
        for record in saved.infolist():
            if not record.filename.endswith(".debug_pkl"):
                written.writestr(record, saved.read(record))
