"""All or nothing: whatever fails, an interrupt at any place among it, a model is what it was, object by object.

What a verb changes is how a model is put together: classes, attributes, tables of parameters, buffers and modules,
hooks, flags. These are kept by reference, which costs no memory. No base tensor is ever written, so that of values only
those that may be are kept: cores and ``coeff``, which are small, and buffers where a forward runs.
"""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from surgery.hosting.other_threads import check_idle
from surgery.hosting.state import shared_tensors, state_of
from surgery.hosting.subclasses import change_class
from surgery.modules.adapter import Adapter
from surgery.modules.core import Core, Factors
from surgery.modules.steering import Steering

TABLES = (dict, OrderedDict, set, list)
FIXED = ("__dict__", "__weakref__")


@contextlib.contextmanager
def transaction(model: nn.Module, *, forwards: bool = True) -> Iterator[None]:
    """Put a model back, and the random state, if the block raises.

    Args:
        forwards: whether the model may run in the block, which may write to any of its buffers: they are copied.

    Raises:
        SurgeryError: another thread is running the model.
    """
    check_idle(model)
    state = Snapshot(model, forwards=forwards)
    try:
        yield
    except BaseException:
        state.restore()
        raise


class Snapshot:
    """What a model is, by reference."""

    def __init__(self, model: nn.Module, *, forwards: bool = True) -> None:
        objects = list(_objects(model))
        modules = [part for part in objects if isinstance(part, nn.Module)]
        self.classes = [(module, type(module)) for module in modules]
        # the class of a graph module, and of one with a parametrised weight, is its own
        own = [type(m) for m in modules if isinstance(m, fx.GraphModule) or parametrize.is_parametrized(m)]
        self.members = [(cls, dict(vars(cls))) for cls in dict.fromkeys(own)]
        self.tables = [(table, table.copy()) for part in objects for table in _tables(part)]
        held = [tensor for tensor in shared_tensors(modules).values() if isinstance(tensor, nn.Parameter)]
        self.flags = [(parameter, parameter.requires_grad) for parameter in held]
        self.values = [(tensor, tensor.detach().clone(), tensor._version) for tensor in _written(modules, forwards)]
        self.numbers = random.getstate(), torch.get_rng_state()
        self.fused = torch.backends.mha.get_fastpath_enabled()
        self.state = state_of(model)

    def restore(self) -> None:
        """Put it all back."""
        for module, cls in self.classes:
            if type(module) is not cls:
                change_class(module, cls)
        for cls, members in self.members:
            for name in set(vars(cls)) - set(members):
                delattr(cls, name)
            for name, member in members.items():
                if name not in FIXED and (name not in vars(cls) or vars(cls)[name] is not member):
                    setattr(cls, name, member)
        for table, content in self.tables:
            _put_back(table, content)
        for parameter, flag in self.flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        with torch.no_grad():
            for tensor, value, version in self.values:
                if tensor._version != version and not torch.equal(tensor, value):
                    tensor.copy_(value)
        if self.state is not None:
            self.state.staleness.forget()
        random.setstate(self.numbers[0])
        torch.set_rng_state(self.numbers[1])
        torch.backends.mha.set_fastpath_enabled(self.fused)


def _objects(model: nn.Module) -> Iterator[object]:
    """The model's modules, and what else a verb writes to: the record, what it was before, its configuration."""
    record = state_of(model)
    original = getattr(record, "original", None)
    roots = [model, *(m for m in (original.modules.values() if original else ()) if m is not None)]
    seen: set[nn.Module] = set()
    modules = [module for root in roots for _, module in root.named_modules(seen)]
    yield from modules
    for adapter in (module for module in modules if isinstance(module, Adapter)):
        yield adapter.host
        yield adapter.base_weight
    yield from (part for part in (record, original, getattr(model, "config", None)) if hasattr(part, "__dict__"))


def _tables(part: object) -> Iterator[Any]:
    yield vars(part)
    yield from (value for value in vars(part).values() if type(value) in TABLES)


def _put_back(table: Any, content: Any) -> None:
    if isinstance(table, dict):
        same = len(table) == len(content) and all(
            k is j and v is w for (k, v), (j, w) in zip(table.items(), content.items(), strict=True)
        )
        if not same:
            table.clear()
            table.update(content)
    elif isinstance(table, set):
        if table != content:
            table.clear()
            table.update(content)
    elif len(table) != len(content) or any(v is not w for v, w in zip(table, content, strict=True)):
        table[:] = content


def _written(modules: Iterable[nn.Module], forwards: bool) -> list[torch.Tensor]:
    """The tensors that a verb or a forward may write to in place."""
    found: dict[int, torch.Tensor] = {}
    for module in modules:
        if isinstance(module, Core):
            found |= {id(p): p for p in module._parameters.values() if p is not None}
        if isinstance(module, (Core, Steering)) or (forwards and not isinstance(module, (Factors, Adapter))):
            found |= {id(b): b for b in module._buffers.values() if b is not None}
    return [t for t in found.values() if not t.is_meta and not t.is_inference()]
