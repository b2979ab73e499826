"""How failures of other libraries, and of the model itself, are reported."""

from __future__ import annotations

from torch import nn

from passes.errors import InputError
from passes.ir.forward_context import Call
from surgery.support.hf_config import first_line


def type_and_message(error: BaseException) -> str:
    """The type of an error and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error)}"


def run_on_examples(model: nn.Module, call: Call) -> object:
    """Run a model on the example inputs, which are not copied.

    Raises:
        InputError: it does not run; the cause is chained.
    """
    args, kwargs = call
    try:
        return model(*args, **kwargs)
    except Exception as error:  # a model may fail in any way
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"the model does not run on the example inputs: {what}") from error
