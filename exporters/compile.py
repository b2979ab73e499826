"""``torch.compile`` of an operated model's graph, after the pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from exporters.program.live_program import call_of
from exporters.shared.agreement import differ
from exporters.shared.report import working_copy
from exporters.shared.subject import Subject
from passes.transforms.fold import Fold
from passes.transforms.fuse_projections import Fuse
from passes.transforms.insert import Insert
from passes.transforms.merge import Merge
from surgery import pipeline
from surgery.errors import ExportError
from surgery.verbs.apply import unwrap

STAGES = {"live": Insert.name, "folded": Fold.name, "merged": Merge.name}


def compiled(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    form: str = "delta",
    mode: str = "live",
    fuse: bool = False,
    verify: bool = True,
    **options: Any,
) -> Any:
    """Compile the graph of an operated model; the model is left as it was.

    The result is called as the model is, in eval mode; the tensors of a ``transformers`` model are keywords, its flags
    are those of the example. It is ``torch.compile``'s wrapper of the graph, so that ``set_coeff``, ``steer`` and
    ``sites`` work on it; neither a coeff nor a core that changes compiles again. Its cores are the model's own, its
    coeff is its own.

    Args:
        example_inputs: dict, tuple or tensor; ``transformers`` models have defaults.
        form: "delta" or "residual", see :func:`surgery.to_graph`.
        mode: the last stage of the pipeline: "live" (adapters inserted), "folded" (frozen factors folded too), or
            "merged" (dense weights at the present coeff).
        fuse: let sites that read the same input share one down-projection.
        verify: run it on the example inputs, which compiles it, and compare it with the model.
        options: of ``torch.compile`` (``backend``, ``fullgraph``, ``dynamic``, ...).

    Raises:
        ExportError: mode is unknown, or the results differ from the model's.
        SurgeryError: as :func:`surgery.pipeline`.
    """
    if mode not in STAGES:
        raise ExportError(f"mode must be one of {', '.join(STAGES)}; found {mode!r}")
    stop = Fuse.name if fuse and mode != "merged" else STAGES[mode]
    disable = [Fold.name] if fuse and mode == "live" else []
    model = unwrap(model)
    graph = pipeline(model, example_inputs, form=form, fuse=fuse, stop_after=stop, disable=disable).graph
    program = torch.compile(graph, **options)
    if verify:
        reference = working_copy(model)
        call, flags = call_of(reference, example_inputs)
        _, problem = differ(Subject(reference, reference, call, flags, (None,)), program, call)
        if problem is not None:
            raise ExportError(f"the compiled graph of {type(model).__name__} differs from the model: {problem}")
    return program
