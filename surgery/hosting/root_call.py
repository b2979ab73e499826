"""A call of a root: what is cached is checked before it, and its rows and tokens have their coefficients meanwhile."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from passes.errors import InputError
from passes.ir.forward_context import Call
from passes.ir.torch_internals import function_transforms, pass_over, sequence_number
from surgery.hosting.coefficient import Coefficient, Sequences
from surgery.hosting.state import State, sites_of
from surgery.modules.setting import Setting
from surgery.support.untrusted_files import JsonObject

_CALLS = threading.RLock()  # coefficients of rows and tokens are written for the length of a call


@dataclass
class RootCall:
    """A call of the root.

    Attributes:
        before: the buffers that the call has replaced.
        recalled: of a call within a backward, what was in force before.
        since: of a call that autograd records, the number of its first node.
    """

    before: dict[str, torch.Tensor | None] | None = None
    recalled: Setting | None = None
    since: int | None = None


@functools.partial(pass_over, inner=True)
def begin(root: nn.Module, state: State, args: tuple[object, ...], kwargs: dict[str, object]) -> RootCall:
    """Arm the sites for a call of the root: what is cached is checked, and rows have the coefficients of this call."""
    steering, staleness, call = state.steering, state.staleness, RootCall()
    recalled = steering.recall()
    if recalled is not None:
        call.recalled = now = recalled.now
        if isinstance(now.given, Coefficient):
            value, second = _of_call(root, state, now.given, (args, kwargs))
            recalled.set(Setting(value, second, {}, now.rows, known=True, given=now.given))
        return call
    sites_of(root, state)
    if function_transforms() is None:  # whose tensors have no values to compare; sites then use nothing that is cached
        staleness.check()
        if root.training or torch.is_grad_enabled():  # the forward of reentrant checkpointing runs without gradients
            steering.record(staleness.snapshot())
            call.since = sequence_number()
    if staleness.offloaded:
        vars(steering)["brought"] = [(part, *_brought_in(part)) for part in staleness.offloaded]
    if state.coefficient is not None:
        _CALLS.acquire()  # until end
        try:
            value, second = _of_call(root, state, state.coefficient, (args, kwargs))
            vars(steering)["caller"] = threading.get_ident()
            call.before = steering.begin_call(value, second)
        except BaseException:
            _disarm(state)
            _CALLS.release()
            raise
    vars(steering)["armed"] = True
    return call


def _of_call(root: nn.Module, state: State, given: Coefficient, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The coefficients of the rows or tokens of one call, as the model's own are kept."""
    steering, sequences = state.steering, Sequences(root, *call)
    dim = state.rows.batch_dim(root, sites_of(root, state), steering, call, sequences, given)
    value, second = given.of_call(sequences, dim, generating=steering.generating)
    like = steering.coeff
    return value.to(like.device, like.dtype), None if second is None else second.to(like.device, like.dtype)


def _brought_in(part: nn.Module) -> tuple[JsonObject, JsonObject]:
    """Hold the tensors of a core or of factors that accelerate has offloaded, since nobody calls these modules.

    Returns:
        The parameters and buffers that stood for them, which :func:`_end` puts back.
    """
    tensors: JsonObject = part()
    before = dict(part._parameters), dict(part._buffers)
    for table in (part._parameters, part._buffers):
        table.update({name: tensors[name] for name in table if name in tensors})
    return before


def is_within(state: State) -> bool:
    """Whether this thread is within a call of the root."""
    return state.steering.armed and state.steering.caller in (None, threading.get_ident())


def refuse_rows(state: State) -> None:
    """Refuse a coefficient per row under ``nn.DataParallel``.

    Raises:
        InputError: there is one.
    """
    if state.coefficient is not None:
        raise InputError("nn.DataParallel splits the batch, so that it takes no coeff for each row: use a number")


def _disarm(state: State) -> None:
    steering = state.steering
    vars(steering).update(armed=False, caller=None)
    for part, parameters, buffers in vars(steering).pop("brought", ()):
        part._parameters.update(parameters)
        part._buffers.update(buffers)


@functools.partial(pass_over, inner=True)
def end(state: State, call: RootCall, output: object) -> None:
    """Disarm the sites, and keep what was in force for as long as the graph of the output is there."""
    steering = state.steering
    if call.recalled is not None:
        steering.set_setting(call.recalled)
        return
    if call.since is not None and steering.log is not None:
        steering.log.hold(_recorded(output), call.since)
    _disarm(state)
    if call.before is not None:
        try:
            steering.end_call(call.before)
        finally:
            _CALLS.release()


def _recorded(output: object) -> list[torch.Tensor]:
    """The tensors of an output that have a graph."""
    if isinstance(output, torch.Tensor):
        return [] if output.grad_fn is None else [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in _recorded(value)]
