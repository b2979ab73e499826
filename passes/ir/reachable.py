"""What is reachable from a module: what a forward may write to and leave a trace in.

Attributes of modules and other objects (``__dict__``, ``__slots__``); tables (dict, list, set, deque and their
subclasses); the closures of hooks, and of a forward on the instance; partial functions and the objects of bound
methods; the tensors and random generators in all of these. Not entered: classes, Python's modules, globals of
functions, weak references, locks, threads, files, logs, graphs of torch, and what is written in C.
"""

from __future__ import annotations

import enum
import functools
import random
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from passes.ir.tables import TABLES, Look, Note, Place, look_at_dict, table_looks

ATOMS = frozenset(
    (
        *(bool, int, float, complex, str, bytes, type(None), type, range, slice, types.ModuleType, types.CodeType),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    )
)
NEVER = (type, types.ModuleType, weakref.ref, enum.Enum, types.CodeType, types.FrameType, types.TracebackType)
OUTSIDE = ("torch._", "torch.fx.", "torch.export.", "torch.jit.", "torch.onnx.")
APART = frozenset(("_io", "asyncio", "concurrent", "io", "logging", "multiprocessing", "queue", "sympy", "threading"))
EMPTY = object()  # in place of what a cell or a slot does not hold


class Reachable:
    """Everything reachable from an object, each with its content and the function that puts it back.

    Attributes:
        tensors: each once, those of views of one memory too.
    """

    def __init__(self, root: object) -> None:
        self.tensors: list[torch.Tensor] = []
        self._places: list[Place] = []
        self._empty: list[Any] = []  # most tables of a module are: not worth more than a look
        self._walk(root)

    def _walk(self, root: object) -> None:
        looks: dict[type, tuple[Look, ...]] = {}
        seen = {id(root): root}  # held, so that no identity stands for a second object
        stack, note = [root], self._places.append
        while stack:
            found = stack.pop()
            cls = type(found)
            if cls not in looks:
                looks[cls] = _looks(cls)
            if isinstance(found, torch.Tensor) and looks[cls]:
                self.tensors.append(found)
            for look in looks[cls]:
                for child in look(found, note):
                    kind = type(child)
                    if kind in ATOMS or id(child) in seen:
                        continue
                    if kind in TABLES and not child:
                        self._empty.append(child)
                        continue
                    seen[id(child)] = child
                    stack.append(child)

    def put_back(self) -> None:
        """Give every place the content that it had."""
        for table in self._empty:
            if table:
                table.clear()
        for put, place, content in self._places:
            put(place, content)


def _looks(cls: type) -> tuple[Look, ...]:
    """The functions that look into objects of a class; none for one that is not entered."""
    if issubclass(cls, torch.Generator):
        return (_generator,)
    if issubclass(cls, NEVER) or (_is_outside(cls.__module__) and not issubclass(cls, nn.Module)):
        return ()
    found = [*table_looks(cls), *(look for base, look in KINDS.items() if issubclass(cls, base))]
    if slots := [slot for base in cls.__mro__ if "__slots__" in vars(base) for slot in _members(base)]:
        found.append(functools.partial(_slots, slots))
    return (*found, _attributes) if cls.__dictoffset__ else tuple(found)


def _is_outside(module: object) -> bool:
    name = module if isinstance(module, str) else ""
    return name.startswith(OUTSIDE) or name.partition(".")[0] in APART


def _members(cls: type) -> list[types.MemberDescriptorType]:
    return [value for value in vars(cls).values() if isinstance(value, types.MemberDescriptorType)]


def _attributes(obj: object, note: Note) -> Iterable[object]:
    try:
        table = object.__getattribute__(obj, "__dict__")
    except AttributeError:
        return ()
    note((_put_class, obj, type(obj)))
    return look_at_dict(table, note) if type(table) is dict else ()  # a class may define it as something else


def _put_class(obj: object, cls: type) -> None:
    if type(obj) is not cls:  # a lazy module that has found its shape, a parametrised one
        object.__setattr__(obj, "__class__", cls)


def _slots(slots: list[types.MemberDescriptorType], obj: object, note: Note) -> Iterable[object]:
    content = [_value(slot, obj) for slot in slots]
    note((functools.partial(_put_slots, slots), obj, content))
    return content


def _value(slot: types.MemberDescriptorType, obj: object) -> object:
    try:
        return slot.__get__(obj)
    except AttributeError:
        return EMPTY


def _put_slots(slots: list[types.MemberDescriptorType], obj: object, content: list[object]) -> None:
    for slot, value in zip(slots, content, strict=True):
        if _value(slot, obj) is value:
            continue
        if value is EMPTY:
            slot.__delete__(obj)
        else:
            slot.__set__(obj, value)


def _function(function: types.FunctionType, note: Note) -> Iterable[object]:
    return () if _is_outside(function.__module__) else (*(function.__defaults__ or ()), function.__kwdefaults__)


def _hooks(module: nn.Module, note: Note) -> Iterator[object]:
    """The closures of a module's hooks, and of a forward on the instance, and of functions in these."""
    tables = [table for name, table in vars(module).items() if name.endswith("_hooks") and isinstance(table, dict)]
    pending = [hook for table in tables for hook in table.values()]
    pending += [vars(module)["forward"]] if "forward" in vars(module) else []
    opened: dict[int, object] = {}
    while pending:
        hook = pending.pop()
        while isinstance(hook, (functools.partial, types.MethodType)):
            hook = hook.func if isinstance(hook, functools.partial) else hook.__func__
        if not isinstance(hook, types.FunctionType) or id(hook) in opened or _is_outside(hook.__module__):
            continue
        opened[id(hook)] = hook
        for cell in hook.__closure__ or ():
            content = _content(cell)
            note((_put_cell, cell, content))
            pending.append(content)
            yield content


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return EMPTY


def _put_cell(cell: types.CellType, content: object) -> None:
    if _content(cell) is content:
        return
    if content is EMPTY:
        del cell.cell_contents
    else:
        cell.cell_contents = content


def _method(method: types.MethodType | types.BuiltinMethodType, note: Note) -> Iterable[object]:
    return method.__self__, getattr(method, "__func__", None)  # of a built-in type: seen.append


def _partial(partial: functools.partial[object], note: Note) -> Iterable[object]:
    return partial.func, partial.args, partial.keywords


def _script(module: torch.jit.ScriptModule, note: Note) -> Iterable[object]:
    return *module.parameters(), *module.buffers()


def _tensor(tensor: torch.Tensor, note: Note) -> Iterable[object]:
    return (tensor.grad if tensor.is_leaf else None,)


def _generator(generator: torch.Generator, note: Note) -> Iterable[object]:
    note((_put_state, generator, generator.get_state()))
    return ()


def _put_state(generator: torch.Generator, state: torch.Tensor) -> None:
    generator.set_state(state)


def _random(generator: random.Random, note: Note) -> Iterable[object]:
    note((random.Random.setstate, generator, generator.getstate()))
    return ()


KINDS: dict[type, Look] = {
    types.FunctionType: _function,
    types.MethodType: _method,
    types.BuiltinMethodType: _method,
    functools.partial: _partial,
    nn.Module: _hooks,
    torch.jit.ScriptModule: _script,
    torch.Tensor: _tensor,
    random.Random: _random,
}
