"""The root of an operated model: its call is the one place that checks what is stale and what each row is to use."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from passes.errors import InputError, SurgeryError
from passes.ir.torch_internals import REPLICA, pass_over, sequence_number
from surgery.hosting.coefficient import Coefficient
from surgery.hosting.staleness import CoreSnapshot
from surgery.hosting.state import STATE, State, adapters_of, sites_of, state_of, unwrap
from surgery.hosting.subclasses import Pickles, has_mixin, put_on, take_off
from surgery.modules.adapter import Adapter
from surgery.modules.setting import Setting
from surgery.modules.steering import Steering

_CALLS = threading.RLock()  # coefficients of rows and tokens are written for the length of a call


class Root(Pickles):
    """Mixin of the module that was given to ``apply_surgery``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Check what is stale, then call the model; a frame that Dynamo skips, so that it runs before compiled code."""
        state: State | None = vars(self).get(STATE)
        if state is None or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if state.steering.armed and state.steering.caller in (None, threading.get_ident()):  # within such a call
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if vars(self).get(REPLICA):  # of nn.DataParallel, whose threads share what is cached
            _refuse_rows(state)
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        call, output = _begin(self, state, args, kwargs), None
        try:
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            return output
        finally:
            _end(state, call, output)

    def __setstate__(self, values: dict[str, object]) -> None:
        super().__setstate__(values)  # type: ignore[misc]
        state: State | None = vars(self).get(STATE)
        if state is not None:
            _hold(state, self)  # type: ignore[arg-type]


class GeneratingRoot(Root):
    """Root of a model that generates text: inside of ``generate``, the rows of a batch are repeated for beams."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``."""
        state: State | None = vars(self).get(STATE)
        generate: Callable[..., Any] = super().generate  # type: ignore[misc]
        if state is None:
            return generate(*args, **kwargs)
        before, state.steering.generating = state.steering.generating, True
        try:
            return generate(*args, **kwargs)
        finally:
            state.steering.generating = before


pass_over(Root.__call__)


@dataclass
class _Call:
    """A call of the root.

    Attributes:
        before: the buffers that the call has replaced.
        recalled: of a call within a backward, what was in force before.
        since: of a call that autograd records, the number of its first node.
    """

    before: dict[str, torch.Tensor | None] | None = None
    recalled: Setting | None = None
    since: int | None = None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _begin(root: Any, state: State, args: Any, kwargs: Any) -> _Call:
    """Arm the sites for a call of the root: what is cached is checked, and rows have the coefficients of this call."""
    steering, staleness, call = state.steering, state.staleness, _Call()
    recalled = steering.recall()
    if recalled is not None:
        call.recalled = now = recalled.now
        if isinstance(now.given, Coefficient):
            value, second = _of_call(now.given, steering, root, args, kwargs)
            recalled.set(Setting(value, second, {}, now.rows, known=True, given=now.given))
        return call
    sites_of(root, state)
    staleness.check()
    if root.training or torch.is_grad_enabled():  # the forward of reentrant checkpointing runs without gradients
        steering.record(staleness.snapshot())
        call.since = sequence_number()
    if state.coefficient is not None:
        value, second = _of_call(state.coefficient, steering, root, args, kwargs)
        _CALLS.acquire()  # until _end
        vars(steering)["caller"] = threading.get_ident()
        try:
            call.before = steering.begin_call(value, second)
        except BaseException:
            vars(steering)["caller"] = None
            _CALLS.release()
            raise
    vars(steering)["armed"] = True
    return call


def _of_call(
    given: Coefficient, steering: Steering, root: nn.Module, args: Any, kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The coefficients of rows or tokens for one call, as the model's own are kept."""
    value, second = given.of_call(root, args, kwargs, generating=steering.generating)
    like = steering.coeff
    return value.to(like.device, like.dtype), None if second is None else second.to(like.device, like.dtype)


def _refuse_rows(state: State) -> None:
    if state.coefficient is not None:
        raise InputError("nn.DataParallel splits the batch, so that it takes no coeff for each row: use a number")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _end(state: State, call: _Call, output: object) -> None:
    """Disarm the sites."""
    steering = state.steering
    if call.recalled is not None:
        steering.set_setting(call.recalled)
        return
    if call.since is not None and steering.log is not None:
        steering.log.hold(_recorded(output), call.since)
    vars(steering).update(armed=False, caller=None)
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


def make_root(model: nn.Module, state: State) -> None:
    """Give a model its state, and make its class that of a root."""
    vars(model)[STATE] = state
    state.steering.requires_grad = state.requires_grad
    _hold(state, model)
    if not isinstance(model, fx.GraphModule):
        put_on(model, GeneratingRoot if hasattr(model, "generate") else Root)
        if "forward" not in vars(type(model)) and type(model).forward.__module__.startswith("torch.nn."):
            type(model).forward = _seen_by_dynamo(type(model).forward)  # type: ignore[method-assign]


def _hold(state: State, model: nn.Module) -> None:
    """Let what steers a root know it, but not keep it alive."""
    root = weakref.ref(model)

    def look() -> CoreSnapshot:
        found = root()
        assert found is not None
        sites_of(found, state)
        state.staleness.check()
        return state.staleness.snapshot()

    state.steering.root, state.steering.look = root, look


def _seen_by_dynamo(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a class of PyTorch's own, as a function of this file.

    Dynamo passes over frames of ``torch.nn``, so that ``torch.compile`` would trace the call of such a root as well.
    """

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return run


def unmake_root(model: nn.Module) -> None:
    """Take state and class off a root."""
    for mixin in (GeneratingRoot, Root):
        if has_mixin(model, mixin):
            take_off(model, mixin)
    vars(model).pop(STATE, None)


def call_as_it_is(model: nn.Module) -> None:
    """Take off a root's own call, of a copy that is to be exported: its coefficient becomes an input."""
    for module in model.modules():
        for mixin in (GeneratingRoot, Root):
            if has_mixin(module, mixin):
                take_off(module, mixin)


def share_steering(model: nn.Module, state: State, coming: Iterable[Adapter] = ()) -> None:
    """Let all adapters of a root follow its coefficient; the first one registers it, of a graph each.

    Args:
        coming: adapters that are not in the model yet.
    """
    found = [*adapters_of(model).values(), *coming]
    for i, site in enumerate(found):
        site.share(state.steering, register=i == 0 or site.host.inlined)
    state.staleness.forget()
    if found:
        wide = functools.reduce(torch.promote_types, (site.core.dtype for site in found), torch.float32)
        devices = [site.device for site in found]
        coeff = state.steering.coeff
        if coeff.dtype != wide or coeff.device not in devices:
            state.steering._buffers["coeff"] = coeff.to(devices[0], wide)
        state.steering.spread(devices)


def roots_of(model: object) -> list[nn.Module]:
    """The roots that a verb works on: the model itself, or all that it contains.

    Raises:
        SurgeryError: it carries no surgery, or is a part of a root.
    """
    model = unwrap(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module, found {type(model).__name__}")
    if state_of(model) is not None:
        return [model]
    roots = [module for module in model.modules() if state_of(module) is not None]
    if roots:
        return roots
    found = adapters_of(model)
    if not found:
        raise SurgeryError(f"{type(model).__name__} carries no surgery: call apply_surgery or load_adapter first")
    first = next(iter(found.values()))
    root = first.steering.root() if first.steering.root is not None else None
    if root is not None and any(module is model for module in root.modules()):
        raise SurgeryError(
            f"{type(model).__name__} is a part of a {type(root).__name__} that was operated on as a whole: call this "
            f"on the {type(root).__name__}, whose sites share one coefficient"
        )
    _adopt(model, found)
    return [model]


def _adopt(model: nn.Module, found: dict[str, Adapter]) -> None:
    """Make a root of a copy of a part, or of a layer that was moved elsewhere."""
    key, first = next(iter(found.items()))
    prefix = first.key.removesuffix(key)
    known = first.steering.requires_grad
    flags = {name.removeprefix(prefix): flag for name, flag in known.items() if name.startswith(prefix)}
    before = first.steering
    state = State(flags, steering=Steering(before.coeff.dtype, before.coeff.device))
    state.steering.write(before.coeff, before.second)
    if before.coeff.dim():
        state.coefficient = Coefficient(before.coeff, before.second)
    else:
        state.number = float(before.coeff)
    share_steering(model, state)
    make_root(model, state)
