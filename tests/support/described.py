"""A whole model as lines: every attribute, table, closure of a hook and tensor, found by a walk of its own."""

from __future__ import annotations

import hashlib
import random
import types
from collections import deque
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

ATOMS = (bool, int, float, str, bytes, type(None), type, torch.Size, torch.dtype, torch.device, types.ModuleType)


class Described(list[str]):
    """Lines that can be compared, and the objects behind them, kept alive so that no identity is used twice."""

    held: list[Any]


def described(model: nn.Module, *, identities: bool = True) -> Described:
    """What a model is.

    Args:
        identities: tell objects apart also where they are alike; else equal ones are described by the same lines.
    """
    lines = Described()
    lines.held = []
    _describe("", model, lines, {}, identities)
    return lines


def _describe(path: str, thing: Any, lines: Described, known: dict[int, int], identities: bool) -> None:
    if isinstance(thing, ATOMS):
        lines.append(f"{path} = {thing!r}")
        return
    if id(thing) in known:
        lines.append(f"{path} is number {known[id(thing)]}")
        return
    known[id(thing)] = len(known)
    lines.held.append(thing)
    lines.append(f"{path}: {type(thing).__module__}.{type(thing).__qualname__} {id(thing) if identities else ''}")
    for name, part in _parts(thing):
        if identities or not isinstance(thing, RemovableHandle):  # it holds a number of the process
            _describe(f"{path}{name}", part, lines, known, identities)


def _parts(thing: Any) -> list[tuple[str, Any]]:
    parts: list[tuple[str, Any]] = []
    if isinstance(thing, torch.Tensor):
        parts.append((" tensor", _tensor(thing)))
    if isinstance(thing, torch.Generator):
        parts.append((" state", _digest(thing.get_state())))
    if isinstance(thing, random.Random):
        parts.append((" state", repr(thing.getstate())))
    if isinstance(thing, dict):
        named = [key if isinstance(key, str) else i for i, key in enumerate(thing)]  # a hook's is one of the process
        parts += [(f"[{name}]", value) for name, value in zip(named, thing.values(), strict=True)]
        parts.append((" order", repr(named)))
    elif isinstance(thing, (list, tuple, deque)):
        parts += [(f"[{i}]", value) for i, value in enumerate(thing)]
    elif isinstance(thing, (set, frozenset)):
        parts.append((" set", repr(sorted(map(repr, thing)))))
    if isinstance(thing, types.FunctionType) and ".hook" in thing.__qualname__:
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        parts += [(f"<{name}>", cell.cell_contents) for name, cell in cells if name != "__class__"]
    if isinstance(thing, types.MethodType):
        parts.append((".__self__", thing.__self__))
    slots = [name for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ()) if name != "__weakref__"]
    if type(thing).__module__.startswith("tests."):
        parts += [(f".{name}", getattr(thing, name, "unset")) for name in slots]
    if hasattr(thing, "__dict__") and not isinstance(thing, types.FunctionType):
        parts += [(f".{name}", value) for name, value in vars(thing).items()]
    return parts


def _tensor(tensor: torch.Tensor) -> str:
    if nn.parameter.is_lazy(tensor):
        return "uninitialised"
    hooks = len(tensor._backward_hooks or {})
    grad = None if not tensor.is_leaf or tensor.grad is None else _digest(tensor.grad)
    kept = tensor.requires_grad, tensor.is_leaf, grad, hooks, tensor.dtype, tuple(tensor.shape), tensor.stride()
    return f"{kept} {_digest(tensor)}"


def _digest(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    data = tensor.detach().clone().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()
