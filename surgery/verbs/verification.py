"""What ``verify=`` asks for, alike in every verb that takes it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from passes.capture.capture import forward_call, hub_inputs, is_pretrained
from passes.errors import InputError
from passes.infra.translation_validation import Validation
from passes.ir.forward_context import Call, copied, inference_mode_of, state_kept
from surgery.hosting.state import record_of
from surgery.verbs.argument_types import Verify


def call_to_verify(model: nn.Module, verify: Verify, captured: Call | None) -> Call | None:
    """The call to compare on, or None where no comparison is asked for.

    Args:
        model: what is called; the inputs of a ``transformers`` model become keywords.
        captured: the call that ``verify=True`` stands for.

    Raises:
        InputError: verify is neither a flag nor example inputs, the model does not run on these, or it is True where
            nothing was captured.
    """
    if verify is None or verify is False:
        return None
    if verify is True:
        if captured is None:
            raise InputError(
                "verify=True stands for the inputs that to_graph captured a graph with, and this "
                f"{type(model).__name__} was not captured by it: pass example inputs as verify="
            )
        return captured
    if not isinstance(verify, (torch.Tensor, tuple, Mapping)):
        raise InputError(
            "verify must be True, False, or example inputs (a dict of keyword arguments, a tuple of positional ones or "
            f"a tensor), found {verify!r:.80}"
        )
    call = forward_call(verify)
    if isinstance(model, fx.GraphModule):  # validation says itself what a graph does not take
        return call
    call = ((), hub_inputs(model, call)) if is_pretrained(model) else call
    try:
        args, kwargs = copied(call)
        with state_kept(model), inference_mode_of(model), torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:  # somebody's model fails in many ways
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise InputError(f"the model does not run on verify's inputs: {type(error).__name__}: {reason}") from error
    return call


def graph_validation(model: nn.Module, verify: Verify) -> Validation | None:
    """Compares an operated graph before and after a pass, or None where no comparison is asked for.

    Raises:
        InputError: as :func:`call_to_verify`.
    """
    call = call_to_verify(model, verify, record_of(model).captured_call)
    return None if call is None else Validation(call)
