"""``torch.compile`` of an operated model's graph, after the pipeline."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from exporters.program.live_program import call_of
from exporters.shared.agreement import differ
from exporters.shared.export_report import working_copy
from exporters.shared.subject import Subject
from surgery import pipeline
from surgery.errors import ExportError
from surgery.hosting.state import unwrap
from surgery.verbs.argument_types import ExampleInputs, Form, Stage, Verify
from surgery.verbs.verification import call_to_verify

Mode = Literal["live", "folded", "merged"]
STAGES: dict[str, Stage] = {"live": "insert", "folded": "fold", "merged": "merge"}


def compiled(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    form: Form = "delta",
    mode: Mode = "merged",
    fuse: bool = False,
    verify: Verify = False,
    **options: Any,
) -> nn.Module:
    """Compile the graph of an operated model; the model is left as it was.

    The result is called as the model is, in eval mode; the tensors of a ``transformers`` model are keywords, its flags
    are those of the example. It is ``torch.compile``'s wrapper of the graph, so that ``set_coeff``, ``steer`` and
    ``sites`` work on it; neither a coeff nor a core that changes compiles again. Its cores are the model's own, its
    coeff is its own.

    Args:
        example_inputs: dict, tuple or tensor; ``transformers`` models have defaults.
        form: "delta" or "residual", see :func:`surgery.to_graph`.
        mode: as of every export: "merged" (dense weights at the present coeff, so that there is nothing left to steer),
            "live" (adapters inserted), or "folded" (frozen factors folded too).
        fuse: let sites that read the same input share one down-projection.
        verify: run it on these inputs, which compiles it, and compare it with the model; True takes the example inputs.
        options: of ``torch.compile`` (``backend``, ``fullgraph``, ``dynamic``, ...).

    Raises:
        ExportError: mode is unknown, or the results differ from the model's.
        SurgeryError: as :func:`surgery.pipeline`.
    """
    if mode not in STAGES:
        raise ExportError(f"mode must be one of {', '.join(STAGES)}; found {mode!r}")
    stop: Stage = "fuse" if fuse and mode != "merged" else STAGES[mode]
    disable: list[Stage] = ["fold"] if fuse and mode == "live" else []
    model = unwrap(model)
    graph = pipeline(model, example_inputs, form=form, fuse=fuse, stop_after=stop, disable=disable).graph
    program = torch.compile(graph, **options)
    assert isinstance(program, nn.Module)
    if call_to_verify(model, verify, ((), {})) is not None:
        reference = working_copy(model)
        call, flags = call_of(reference, example_inputs if verify is True else verify)
        _, problem = differ(Subject(reference, reference, call, flags, (None,)), program, call)
        if problem is not None:
            raise ExportError(f"the compiled graph of {type(model).__name__} differs from the model: {problem}")
    return program
