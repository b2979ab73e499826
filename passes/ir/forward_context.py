"""Run a model's forward, or trace it, without leaving anything behind: mode, state, inputs, log lines."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import fx, nn

from passes.ir.torch_internals import tree_iter

P = ParamSpec("P")
T = TypeVar("T")
Call = tuple[tuple[Any, ...], dict[str, Any]]

ExampleInputs = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]
"""A tensor is the only argument, a tuple the positional ones, a mapping the keywords."""


def outside_inference_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function outside of inference mode, since tensors that are made in it can never be trained."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Switch a model between train and eval mode; an exported graph, which forbids ``eval()``, by its flags."""
    if isinstance(model, fx.GraphModule):
        for module in model.modules():
            module.training = training
    else:
        model.train(training)


def copied(call: Call) -> Call:
    """A deep copy of the inputs (a forward may write into them, or into a cache), detached from any graph."""
    cut = [x for x in tree_iter(call) if isinstance(x, torch.Tensor) and not x.is_leaf]
    return copy.deepcopy(call, {id(x): x.detach().clone() for x in cut})  # one tensor given twice stays one


@contextlib.contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and each back in the mode that it was in."""
    flags = [(module, module.training) for module in model.modules()]
    set_mode(model, training=False)
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Keep random state, buffers and attributes over a forward that may write to them."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    attributes = [
        (module, type(module), dict(vars(module)), dict(module._buffers), set(module._non_persistent_buffers_set))
        for module in model.modules()
    ]
    devices = {p.device.index or 0 for p in model.parameters() if p.is_cuda}
    numbers = random.getstate()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(numbers)
        for module, kind, before, registered, transient in attributes:
            if type(module) is not kind:  # a lazy module that has found its shape
                continue
            vars(module).clear()
            vars(module).update(before)
            module._buffers.clear()
            module._buffers.update(registered)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(transient)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextlib.contextmanager
def keep_forward(model: nn.Module) -> Iterator[None]:
    """Undo what an exporter leaves behind when it replaces ``model.forward`` on the instance."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        if before is None:
            vars(model).pop("forward", None)
        else:
            vars(model)["forward"] = before


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keep libraries from reporting every step and every version that they were not tested with; errors still show."""
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in loggers]
    try:
        for logger, _ in levels:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


@contextlib.contextmanager
def partial_graph_unprinted() -> Iterator[None]:
    """Keep ``torch.export`` from printing the graph that it has where it fails; all else that is printed still is."""
    logger, written, graph = logging.getLogger("torch.fx.experimental.symbolic_shapes"), io.StringIO(), ""
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with contextlib.redirect_stderr(written):
            yield
    except Exception as error:
        graph = str(vars(error).get("partial_fx_graph", ""))
        raise
    finally:
        logger.setLevel(level)
        text = written.getvalue()
        print(text.replace(f"{graph}\n", "") if graph else text, end="", file=sys.stderr)
