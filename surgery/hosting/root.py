"""The root of an operated model: its call is the one place that checks what is stale and what each row is to use."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from passes.errors import InputError, SurgeryError
from passes.ir.torch_internals import NOT_BROADCAST, REPLICA, pass_over
from surgery.hosting.coefficient import Coefficient
from surgery.hosting.root_call import begin, end, is_within, refuse_rows
from surgery.hosting.root_mixins import put_mixins_on, take_mixins_off
from surgery.hosting.staleness import CoreSnapshot
from surgery.hosting.state import STATE, State, adapters_of, sites_of, state_of, unwrap
from surgery.hosting.subclasses import Pickles, has_mixin, put_on, take_off
from surgery.modules.adapter import Adapter
from surgery.modules.steering import Steering


class Root(Pickles):
    """Mixin of the module that was given to ``apply_surgery``."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Check what is stale, then call the model; a frame that Dynamo skips, so that it runs before compiled code."""
        state: State | None = vars(self).get(STATE)
        if state is None or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if is_within(state):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if vars(self).get(REPLICA):  # of nn.DataParallel, whose threads share what is cached
            refuse_rows(state)
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        call, output = begin(self, state, args, kwargs), None  # type: ignore[arg-type]
        try:
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            return output
        finally:
            end(state, call, output)

    def __setstate__(self, values: dict[str, object]) -> None:
        super().__setstate__(values)  # type: ignore[misc]
        state: State | None = vars(self).get(STATE)
        if state is not None:
            _hold(state, self)  # type: ignore[arg-type]


class GeneratingRoot(Root):
    """Root of a model that generates text: inside of ``generate``, the rows of a batch are repeated for beams."""

    def generate(self, *args: object, **kwargs: object) -> object:
        """The model's own ``generate``."""
        state: State | None = vars(self).get(STATE)
        generate: Callable[..., object] = super().generate  # type: ignore[misc]
        if state is None:
            return generate(*args, **kwargs)
        before, state.steering.generating = state.steering.generating, True
        try:
            return generate(*args, **kwargs)
        finally:
            state.steering.generating = before


def _not_broadcast(root: nn.Module) -> list[str]:
    """Names of the tensors that DistributedDataParallel is to leave alone: the user's, and all buffers of adapters."""
    given = vars(root).get(NOT_BROADCAST) or getattr(super(Root, root), NOT_BROADCAST, None) or ()
    adapters = [(path, module) for path, module in root.named_modules() if isinstance(module, Adapter)]
    return [*given, *(f"{path}.{name}" for path, adapter in adapters for name, _ in adapter.named_buffers())]


def _name_not_broadcast(root: nn.Module, names: Iterable[str]) -> None:
    vars(root)[NOT_BROADCAST] = names


# it would overwrite them with those of the first rank, before each forward
setattr(Root, NOT_BROADCAST, property(_not_broadcast, _name_not_broadcast))
pass_over(Root.__call__)


def make_root(model: nn.Module, state: State) -> None:
    """Give a model its state, and make its class that of a root.

    Raises:
        SurgeryError: it has an attribute of that name, or its class cannot be subclassed.
    """
    if STATE in vars(model) and state_of(model) is None:
        raise SurgeryError(
            f"{type(model).__name__} has an attribute {STATE!r} of its own, which surgery would take: put it into "
            "another module, as nn.Sequential(model), and operate on that"
        )
    vars(model)[STATE] = state
    state.steering.requires_grad = state.requires_grad
    _hold(state, model)
    if isinstance(model, fx.GraphModule):
        watch_calls(model)
    else:
        try:
            put_on(model, GeneratingRoot if hasattr(model, "generate") else Root)
            put_mixins_on(model)
        except TypeError as error:
            raise SurgeryError(
                f"{type(model).__name__} cannot be a root, as its class cannot be subclassed ({error}): put it into "
                "another module, as nn.Sequential(model), and operate on that"
            ) from error
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


def _seen_by_dynamo(forward: Callable[..., object]) -> Callable[..., object]:
    """The forward of a class of PyTorch's own, as a function of this file.

    Dynamo passes over frames of ``torch.nn``, so that ``torch.compile`` would trace the call of such a root as well.
    """

    @functools.wraps(forward)
    def run(self: nn.Module, *args: object, **kwargs: object) -> object:
        return forward(self, *args, **kwargs)

    return run


def watch_calls(model: fx.GraphModule) -> None:
    """Let calls of a graph module have the coefficients of their rows, as those of :class:`Root` do.

    Its class is its own, and gets another ``__call__`` whenever the graph is compiled to code.
    """
    cls: Any = type(model)

    def put() -> None:
        inner = cls.__call__

        @functools.wraps(inner)
        def call(self: fx.GraphModule, *args: object, **kwargs: object) -> object:
            state: State | None = vars(self).get(STATE)
            if state is None or state.coefficient is None or torch.compiler.is_compiling() or is_within(state):
                return inner(self, *args, **kwargs)
            started, output = begin(self, state, args, kwargs), None
            try:
                output = inner(self, *args, **kwargs)
                return output
            finally:
                end(state, started, output)

        pass_over(call)
        cls.__call__ = call

    def recompile(self: fx.GraphModule) -> object:
        code = super(cls, self).recompile()
        put()
        return code

    cls.recompile = recompile
    put()


def _unwatch_calls(model: fx.GraphModule) -> None:
    cls: Any = type(model)
    if "recompile" in vars(cls):
        del cls.recompile
        cls.__call__ = cls.__call__.__wrapped__


def unmake_root(model: nn.Module) -> None:
    """Take state and class off a root."""
    take_mixins_off(model)
    if isinstance(model, fx.GraphModule):
        _unwatch_calls(model)
    for mixin in (GeneratingRoot, Root):
        if has_mixin(model, mixin):
            take_off(model, mixin)
    vars(model).pop(STATE, None)


def call_as_it_is(model: nn.Module) -> None:
    """Take off a root's own call, of a copy that is to be exported: its coefficient becomes an input."""
    for module in model.modules():
        take_mixins_off(module)
        if isinstance(module, fx.GraphModule):
            _unwatch_calls(module)
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
            state.steering.remember()
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
