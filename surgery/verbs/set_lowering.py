"""Change how the sites of an operated model are computed."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from passes.errors import InputError
from passes.ir.forward_context import ExampleInputs
from surgery.hosting.root import roots_of
from surgery.hosting.state import adapters_of, record_of
from surgery.lowerings import REGISTRY
from surgery.planning.lowering_autotune import measure
from surgery.support.progress_bar import wanted_on

Model = TypeVar("Model", bound=nn.Module)


def set_lowering(
    model: Model, name: str, *, example_inputs: ExampleInputs | None = None, progress: bool | None = None
) -> Model:
    """Choose the lowering of every called site; sites whose weights are read, and graphs, have one way each.

    Args:
        name: "auto" (by the cost model), "measure" (by timing on the example inputs now), or one lowering's name.
        example_inputs: of "measure"; ``transformers`` models have defaults.
        progress: of "measure", show a progress bar; None: on a terminal.

    Raises:
        InputError: there is no such lowering, or it does not fit a site; nothing is changed.
        SurgeryError: the model carries no surgery, or is a part of a root.
    """
    if not isinstance(name, str) or name not in ("auto", "measure", *REGISTRY):
        raise InputError(f"lowering must be one of auto, measure, {', '.join(REGISTRY)}; found {name!r:.80}")
    for root in roots_of(model):
        found = {key: site for key, site in adapters_of(root).items() if site.host.name == "module"}
        if name == "measure":
            measure(root, example_inputs, progress=wanted_on(progress))
            continue
        before = {key: (site.lowering, site.schedule) for key, site in found.items()}
        try:
            for key, site in found.items():
                try:
                    site.reschedule(name)
                except InputError as error:
                    raise InputError(f"site {key!r}: {error}") from error
        except BaseException:
            for key, (lowering, schedule) in before.items():
                found[key].lowering, found[key].schedule = lowering, schedule
            raise
        record_of(root).staleness.forget()
    return model
