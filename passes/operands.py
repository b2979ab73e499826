"""Follow a parameter through views to the operand of a product, and see the parameter as a matrix or a stack of them.

A view of a parameter is written as one tuple of *digits* per dimension: a digit ``(stride, size)`` counts ``size``
entries that lie ``stride`` apart in the parameter. Transposes reorder the dimensions, views regroup the digits, slices
cut a digit, and an index takes one out. Nothing is computed: of a weight of any size only the shape is looked at.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.residual import operation

Digit = tuple[int, int]
Dim = tuple[Digit, ...]
Dims = tuple[Dim, ...]
Lookup = Callable[[str], torch.Tensor | None]

SAME = frozenset(
    ["to", "_to_copy", "alias", "detach", "type_as", "contiguous", "clone", "float", "double", "half", "bfloat16"]
)
MATRIX_TRANSPOSES = frozenset(["mt", "matrix_h", "adjoint"])
PIECES = frozenset(["split", "split_with_sizes", "chunk", "unbind"])
UNKNOWN = 0  # size of a digit that repeats or picks entries, how many is not known here


@dataclass(frozen=True)
class Operand:
    """A view of a parameter: the parameter's name, and the digits of each dimension."""

    weight: str
    dims: Dims


@dataclass(frozen=True)
class Matrices:
    """A parameter as a matrix (``stack`` is None) or a stack of matrices: ``weight.reshape(stack, rows, columns)``."""

    stack: int | None
    d_out: int
    d_in: int
    layout: str


def follow(node: Any, parameter: Lookup) -> Operand | str | None:
    """Follow views and casts from an operand to a parameter.

    Args:
        node: of a normalised graph.
        parameter: gives the patient's parameter of a name, or None.

    Returns:
        The operand; or why a view of a parameter cannot be followed; or None if it is no view of a parameter.
    """
    steps: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        name = operation(node, node.graph)
        if not (name in SAME or name in PIECES or name in STEPS) or not node.args:
            return None
        steps.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    tensor = parameter(str(node.target))
    if tensor is None:
        return None
    dims = _whole(tensor.shape)
    for step in reversed(steps):
        name = operation(step, step.graph)
        if name in SAME or name in PIECES:  # of pieces, the getitem says which
            continue
        found = STEPS[name](step, dims)
        if found is None:
            return f"the parameter {str(node.target)!r} reaches the product through a {name} that cannot be followed"
        dims = found
    return Operand(str(node.target), dims)


def see_matrices(operand: Operand, labels: str, shape: Sequence[int]) -> Matrices | str:
    """See a whole parameter as matrices, by what a product does with the dimensions of a view of it.

    Args:
        labels: per dimension of the operand, "O" (a dimension of the output), "I" (summed over) or "S" (which matrix).
        shape: of the parameter.

    Returns:
        The matrices, or why the parameter is none.
    """
    if len(shape) < 2:
        return f"the parameter {operand.weight!r} is a vector, not a matrix"
    found = [
        (stride, size, label)
        for dim, label in zip(operand.dims, labels, strict=True)
        for stride, size in dim
        if stride and size != 1
    ]
    edges = sorted({math.prod(shape[i:]) for i in range(len(shape) + 1)})
    parts: list[tuple[str, int]] = []
    top = math.prod(shape)
    for stride, size, label in sorted(found, reverse=True):
        if stride * size > top:
            return f"the parameter {operand.weight!r} is read through overlapping views"
        end = min(edge for edge in (*edges, top) if edge >= stride * size)  # a slice shows a part of a dimension
        parts += [("S", top // end), (label, end // stride)]
        top = stride
    parts.append(("S", top))
    merged: list[tuple[str, int]] = []
    for label, size in parts:
        if size == 1:
            continue
        if merged and merged[-1][0] == label:
            merged[-1] = (label, merged[-1][1] * size)
        else:
            merged.append((label, size))
    letters = "".join(label for label, _ in merged)
    if letters in ("OIO", "IOI") or (letters == "SI" and len(shape) == 2):  # heads, each with a matrix; rows one by one
        merged[0] = ("O" if letters == "SI" else "S", merged[0][1])
        letters = "".join(label for label, _ in merged)
    if letters not in ("", "O", "I", "OI", "IO", "S", "SO", "SI", "SOI", "SIO"):
        return f"the dimensions of the parameter {operand.weight!r} are interleaved: it is no stack of matrices"
    sizes = dict(merged)
    layout = "in_out" if letters.endswith("IO") else "out_in"
    return Matrices(sizes.get("S"), sizes.get("O", 1), sizes.get("I", 1), layout)


def sizes_of(operand: Operand) -> list[int]:
    """The shape of an operand."""
    return [_size(dim) for dim in operand.dims]


def _whole(shape: Sequence[int]) -> Dims:
    return tuple(((math.prod(shape[i + 1 :]), n),) if n != 1 else () for i, n in enumerate(shape))


def _size(dim: Dim) -> int:
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
    total = math.prod(_size(dim) for dim in dims)
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
    return tuple(dim for i, dim in enumerate(dims) if i not in gone or _size(dim) != 1)


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
    if size != _size(dim):
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
    kept = range(*part.indices(_size(dims[at])))
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
    how, whole = _argument(source, 1, "chunks" if name == "chunk" else "split_size"), _size(dims[at])
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
