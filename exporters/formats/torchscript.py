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
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporters.program.live_program import NOISY, subject_of
from exporters.program.swap import KNOB
from exporters.shared.agreement import compare, sizes
from exporters.shared.archive import archive
from exporters.shared.report import Exported
from exporters.shared.subject import Subject
from passes.capture.capture import keyword_inputs
from passes.errors import SurgeryError
from passes.ir.forward_context import copied, quiet, state_kept
from passes.ir.torch_internals import archive_reader, archive_writer
from surgery.errors import ExportError

DEFAULT_NAME = "model.pt"
NOTE = "TorchScript is deprecated in PyTorch: use the formats 'pt2' or 'aoti' where the host can load them"


def write(model: nn.Module, path: Path, example_inputs: Any, mode: str = "merged") -> Exported:
    """Trace, freeze and save; load it again, and compare it with PyTorch.

    Args:
        mode: "merged" or "live".

    Raises:
        ExportError: the model cannot be traced, or the program's results differ from PyTorch's.
    """
    subject = subject_of(model, example_inputs, mode)
    _save(_traced(subject), path)
    with quiet(*NOISY):
        loaded: Any = torch.jit.load(str(path))
    error = compare(subject, loaded, lambda coeff: getattr(loaded, KNOB).fill_(coeff), "the TorchScript program")
    details = {"mode": mode, "note": NOTE, "sizes": sizes(subject, loaded), "comparisons": len(subject.coeffs)}
    return Exported(error, details)


def _traced(subject: Subject) -> torch.jit.ScriptModule:
    root = subject.root
    inputs = keyword_inputs(root, copied(subject.call))
    inner = root.forward

    def forward(*args: Any) -> Any:
        return inner(**dict(zip(inputs, args, strict=True)))

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in inputs]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    vars(root)["forward"] = forward
    try:
        with torch.no_grad(), state_kept(root), quiet(*NOISY), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a trace fixes; ``sizes`` tells
            traced: Any = torch.jit.trace(root, tuple(inputs.values()), strict=False, check_trace=False)
            frozen: torch.jit.ScriptModule = torch.jit.freeze(traced, preserved_attrs=[KNOB] if subject.live else [])
            return frozen
    except SurgeryError:
        raise
    except Exception as error:  # a model may resist in any way; the cause is chained
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        name = type(subject.reference).__name__
        raise ExportError(f"{name} cannot be traced: {type(error).__name__}: {reason}") from error


def _save(program: torch.jit.ScriptModule, path: Path) -> None:
    """Save without the debugging records, which hold the paths of source files."""
    with quiet(*NOISY):
        buffer = io.BytesIO()
        torch.jit.save(program, buffer)
    reader = archive_reader(io.BytesIO(buffer.getbuffer()))
    with archive(path) as file:
        writer = archive_writer(file)
        for name in reader.get_all_records():
            if not name.endswith(".debug_pkl") and name not in ("version", ".data/serialization_id"):
                record = reader.get_record(name)
                writer.write_record(name, record, len(record))
        writer.write_end_of_file()
