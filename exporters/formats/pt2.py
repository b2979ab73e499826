"""A ``.pt2`` of ``torch.export``: the model as one graph, which torch alone loads and runs, in Python or compiled.

``merged``  the dense model at the present coeff; nothing in the graph tells that there was an adapter.
``live``    the adapter stays in the graph. Buffer ``coeff`` steers all sites, 1.0 as saved, and each site's core is
            there under its own name (``<site>.core.g``).

    program = torch.export.load("model.pt2").module()
    program.coeff.fill_(0.5)
    logits = program(input_ids=ids)["logits"]

The program takes what ``example_inputs`` were: keywords (``transformers`` models always), or positions. Batch,
sequence and other sizes are free where the model leaves them free. Outputs are tensors, tuples, or a flat dict in place
of a ``transformers`` output. :func:`exporters.swap` puts another trained adapter in; it and the metadata that it reads
are all that is of this library.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from exporters.program.live_program import Mode, foreign_operations, program_of, subject_of
from exporters.shared.agreement import compare_program, refuse_wrong, sizes
from exporters.shared.archive import archive
from exporters.shared.export_report import Exported
from exporters.shared.functional import COEFF
from exporters.shared.options import option

DEFAULT_NAME = "model.pt2"


@dataclass(frozen=True)
class Options:
    """Options of the format "pt2"."""

    mode: Mode = option("merged", "merge the adapter, or keep it in the program")


def write(model: nn.Module, path: Path, example_inputs: object, options: Options) -> Exported:
    """Export to a ``.pt2``, load it again, and compare it with PyTorch.

    Raises:
        ExportError: the model cannot be exported, or the program's results differ from PyTorch's.
    """
    subject = subject_of(model, example_inputs, options.mode)
    program = program_of(subject)
    with archive(path) as file:
        torch.export.save(program, file)
    loaded = torch.export.load(path).module()
    error = compare_program(
        subject, loaded, lambda coeff: loaded.get_buffer(COEFF).fill_(coeff), "the exported program"
    )
    free = refuse_wrong(sizes(subject, loaded), "the exported program")
    details = {"mode": options.mode, "sizes": free, "comparisons": len(subject.coeffs) + len(free)}
    return Exported(error, details | {"foreign_operations": foreign_operations(program)})
