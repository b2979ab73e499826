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
from typing import ParamSpec, TypeVar

import torch
from torch import fx, nn

from passes.errors import SurgeryError
from passes.ir.reachable import Reachable
from passes.ir.tensor_writes import TensorStates
from passes.ir.torch_internals import tree_iter, without_torch_function

P = ParamSpec("P")
T = TypeVar("T")
Call = tuple[tuple[object, ...], dict[str, object]]

ExampleInputs = torch.Tensor | tuple[object, ...] | Mapping[str, object]
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
def state_kept(model: nn.Module, *, watched: bool = True) -> Iterator[None]:
    """Put back everything reachable from a model that a forward may write to, and the random numbers' state.

    What the forward changes of attributes, tables, hooks and their closures, and of tensors, is as it was after the
    block, also where it raises; see :mod:`passes.ir.reachable` for what is reachable.

    Args:
        watched: copy what is written to just before; it costs each operation some microseconds. Else only small tensors
            are put back.

    Raises:
        SurgeryError: a tensor was written to where it was not seen, so that its values are not known.
    """
    with without_torch_function():
        found = Reachable(model)
    tensors = TensorStates(found.tensors)
    devices = {p.device.index or 0 for p in found.tensors if p.is_cuda}
    numbers = random.getstate(), _numpy_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)), tensors.watch if watched else contextlib.nullcontext():
            yield
    finally:
        random.setstate(numbers[0])
        _set_numpy_state(numbers[1])
        with without_torch_function():
            found.put_back()
        if lost := tensors.put_back():
            raise SurgeryError(_cannot_be_put_back(model, lost))


def _numpy_state() -> object:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state()


def _set_numpy_state(state: object) -> None:
    if state is not None:
        sys.modules["numpy"].random.set_state(state)


def _cannot_be_put_back(model: nn.Module, lost: list[torch.Tensor]) -> str:
    names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    which = names.get(id(lost[0]), f"a {type(lost[0]).__name__} that is neither parameter nor buffer")
    return (
        f"{type(model).__name__}: its forward wrote to {which!r} where that could not be seen (in another thread, or "
        f"past torch's operations), so that its values before are lost ({len(lost)} such); load the model again"
    )


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
