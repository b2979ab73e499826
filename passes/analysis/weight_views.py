"""What a view does to the digits of a parameter: transposes, views, slices, indices and pieces.

Digits are explained in :mod:`passes.analysis.operands`. One function per kind of view; None where it cannot be
followed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from passes.analysis.residual_stream import operation

Digit = tuple[int, int]
Dim = tuple[Digit, ...]
Dims = tuple[Dim, ...]

MATRIX_TRANSPOSES = frozenset(["mt", "matrix_h", "adjoint"])
PIECES = frozenset(["split", "split_with_sizes", "chunk", "unbind"])
UNKNOWN = 0  # size of a digit that repeats or picks entries, how many is not known here


def digits_of(shape: Sequence[int]) -> Dims:
    """The digits of a parameter itself."""
    return tuple(((math.prod(shape[i + 1 :]), n),) if n != 1 else () for i, n in enumerate(shape))


def size_of(dim: Dim) -> int:
    """The size of a dimension."""
    return math.prod(size for _, size in dim)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _integers(values: Any) -> list[int] | None:
    """Integers given one by one or in a list; None if one is not known."""
    if len(values) == 1 and isinstance(values[0], (list, tuple, torch.Size)):
        values = values[0]
    return list(values) if all(isinstance(value, int) for value in values) else None


def _reverse(node: fx.Node, dims: Dims) -> Dims | None:
    return dims[::-1]


def _swap_last(node: fx.Node, dims: Dims) -> Dims | None:
    return (*dims[:-2], dims[-1], dims[-2])


def _swap(node: fx.Node, dims: Dims) -> Dims | None:
    one, other = _argument(node, 1, "dim0"), _argument(node, 2, "dim1")
    if not isinstance(one, int) or not isinstance(other, int):
        return None
    swapped = list(dims)
    swapped[one], swapped[other] = swapped[other], swapped[one]
    return tuple(swapped)


def _permute(node: fx.Node, dims: Dims) -> Dims | None:
    order = _integers(node.args[1:] or (node.kwargs.get("dims", (None,)),))
    return None if order is None else tuple(dims[i] for i in order)


def _view(node: fx.Node, dims: Dims) -> Dims | None:
    """Regroup the digits, the last dimension varying fastest, into dimensions of other sizes."""
    value = node.meta.get("val")
    shape = _integers(node.args[1:]) if operation(node, node.graph) in ("view", "reshape", "_unsafe_view") else None
    if value is not None and all(isinstance(size, int) for size in value.shape):
        shape = list(value.shape)
    if shape is None or any(size == UNKNOWN for dim in dims for _, size in dim):
        return None
    total = math.prod(size_of(dim) for dim in dims)
    if -1 in shape:
        shape[shape.index(-1)] = total // max(1, math.prod(size for size in shape if size != -1))
    if math.prod(shape) != total:
        return None
    digits = [digit for dim in dims for digit in dim]
    grouped: list[Dim] = []
    for wanted in shape:
        dim: list[Digit] = []
        while wanted > 1:
            stride, size = digits.pop(0)
            if wanted % size == 0:
                dim.append((stride, size))
                wanted //= size
            elif size % wanted == 0:
                dim.append((stride * (size // wanted), wanted))
                digits.insert(0, (stride, size // wanted))
                wanted = 1
            else:
                return None
        grouped.append(tuple(dim))
    return tuple(grouped)


def _flatten(node: fx.Node, dims: Dims) -> Dims | None:
    start, end = _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)
    start, end = start % len(dims), end % len(dims)
    return (*dims[:start], tuple(digit for dim in dims[start : end + 1] for digit in dim), *dims[end + 1 :])


def _squeeze(node: fx.Node, dims: Dims) -> Dims | None:
    given = _integers(node.args[1:]) if len(node.args) > 1 else list(range(len(dims)))
    if given is None:
        return None
    gone = {i % len(dims) for i in given}
    return tuple(dim for i, dim in enumerate(dims) if i not in gone or size_of(dim) != 1)


def _unsqueeze(node: fx.Node, dims: Dims) -> Dims | None:
    at = _argument(node, 1, "dim")
    at = at % (len(dims) + 1)
    return (*dims[:at], (), *dims[at:])


def _expand(node: fx.Node, dims: Dims) -> Dims | None:
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    whole: list[Dim] = [()] * (len(sizes) - len(dims)) + list(dims)
    for i, size in enumerate(sizes):
        known = size if isinstance(size, int) else UNKNOWN
        if not whole[i] and known not in (-1, 1):
            whole[i] = ((0, known),)
    return tuple(whole)


def _cut(dims: Dims, at: int, size: int) -> Dims | None:
    """A slice of ``size`` entries of a dimension."""
    at %= len(dims)
    dim = dims[at]
    if size != size_of(dim):
        if len(dim) != 1:
            return None
        dim = ((dim[0][0], size),)
    return (*dims[:at], dim, *dims[at + 1 :])


def _slice(node: fx.Node, dims: Dims) -> Dims | None:
    at, step = _argument(node, 1, "dim", 0), _argument(node, 4, "step", 1)
    return _sliced(dims, at, slice(_argument(node, 2, "start"), _argument(node, 3, "end"), step))


def _sliced(dims: Dims, at: int, part: slice) -> Dims | None:
    if any(not isinstance(value, (int, type(None))) for value in (part.start, part.stop, part.step)):
        return None
    kept = range(*part.indices(size_of(dims[at])))
    return _cut(dims, at, len(kept)) if kept.step == 1 and len(kept) else None


def _narrow(node: fx.Node, dims: Dims) -> Dims | None:
    at, length = _argument(node, 1, "dim"), _argument(node, 3, "length")
    return _cut(dims, at, length) if isinstance(length, int) else None


def _select(node: fx.Node, dims: Dims) -> Dims | None:
    at = _argument(node, 1, "dim") % len(dims)
    return (*dims[:at], *dims[at + 1 :])


def _picked(dims: Dims, at: int) -> Dims:
    """A dimension whose entries are chosen by another tensor."""
    return (*dims[:at], ((0, UNKNOWN),), *dims[at + 1 :])


def _index(node: fx.Node, dims: Dims) -> Dims | None:
    indices: Any = node.args[1]
    given = [i for i, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return None
    value = getattr(indices[given[0]], "meta", {}).get("val")
    if isinstance(value, torch.Tensor) and value.dim() != 1:
        whole = ((0, UNKNOWN),) * value.dim()
        return (*dims[: given[0]], *((digit,) for digit in whole), *dims[given[0] + 1 :])
    return _picked(dims, given[0])


def _index_select(node: fx.Node, dims: Dims) -> Dims | None:
    return _picked(dims, _argument(node, 1, "dim") % len(dims))


def _getitem(node: fx.Node, dims: Dims) -> Dims | None:
    """A piece of a split, or Python's ``w[...]``."""
    source, key = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    name = operation(source, source.graph)
    if name in PIECES and source.op in ("call_function", "call_method"):
        return _piece(source, name, key, dims)
    at, found = 0, dims
    for part in key if isinstance(key, tuple) else (key,):
        result: Dims | None
        if isinstance(part, bool) or part is None or at >= len(found):
            return None
        if isinstance(part, int):
            result = (*found[:at], *found[at + 1 :])
        else:
            result = _sliced(found, at, part) if isinstance(part, slice) else None
            at += 1
        if result is None:
            return None
        found = result
    return found


def _piece(source: fx.Node, name: str, index: Any, dims: Dims) -> Dims | None:
    at = _argument(source, 1 if name == "unbind" else 2, "dim", 0) % len(dims)
    if name == "unbind":
        return (*dims[:at], *dims[at + 1 :])
    how, whole = _argument(source, 1, "chunks" if name == "chunk" else "split_size"), size_of(dims[at])
    if isinstance(how, (list, tuple)):
        size = how[index]
    else:
        step = math.ceil(whole / how) if name == "chunk" else how
        size = min(step, whole - step * (index % math.ceil(whole / step)))
    return _cut(dims, at, size) if isinstance(size, int) else None


STEPS: dict[str, Callable[[fx.Node, Any], Dims | None]] = {
    "t": _reverse, "numpy_t": _reverse, "transpose": _swap, "swapaxes": _swap, "swapdims": _swap,
    "permute": _permute, "view": _view, "reshape": _view, "_unsafe_view": _view, "unflatten": _view,
    "flatten": _flatten, "squeeze": _squeeze, "unsqueeze": _unsqueeze, "expand": _expand, "slice": _slice,
    "narrow": _narrow, "select": _select, "index": _index, "index_select": _index_select,
    operator.getitem.__name__: _getitem, **dict.fromkeys(MATRIX_TRANSPOSES, _swap_last),
}  # fmt: skip
