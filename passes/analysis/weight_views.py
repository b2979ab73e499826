"""What a view does to the digits of a parameter, read off the view that torch itself makes of a meta tensor.

A dimension of an operand is a tuple of *digits* ``(stride, size)``: ``size`` entries that lie ``stride`` apart in the
parameter. To see through a node, its own operation runs on a contiguous meta tensor of the operand's shape; the strides
and the offset of what it gives say which digits, and which parts of them, each dimension counts. So every view that
torch has is followed, without a table, and no memory is touched.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from passes.analysis.residual_stream import operation
from passes.ir.torch_internals import OpOverload, schema_of, storage_address

Digit = tuple[int, int]
Dim = tuple[Digit, ...]
Dims = tuple[Dim, ...]

UNKNOWN = 1_000_003  # stands for a size that is not known here; a prime, so that it fits into no other
GETITEM = operator.getitem.__name__
PICKS = frozenset(["index", "index_select"])  # not views, and followed: which entries they pick need not be known


def digits_of(shape: Sequence[int]) -> Dims:
    """The digits of a parameter itself."""
    return tuple(((math.prod(shape[i + 1 :]), n),) if n != 1 else () for i, n in enumerate(shape))


def dim_size(dim: Dim) -> int:
    """The size of a dimension."""
    return math.prod(size for _, size in dim)


def can_be_followed(node: fx.Node) -> bool:
    """Whether an operation may show what it is given, or picks of it."""
    name = operation(node, node.graph)
    if name in (GETITEM, "_unsafe_view", *PICKS):
        return True
    return _shares_memory(node.target if isinstance(node.target, OpOverload) else name)


@functools.cache
def _shares_memory(target: OpOverload | str) -> bool:
    """Whether the schema of an ATen overload, or of one of a name, says that it gives views of its first argument."""
    if isinstance(target, str):
        packet = getattr(torch.ops.aten, target, None)
        overloads = [getattr(packet, each) for each in packet.overloads()] if packet is not None else []
    else:
        overloads = [target]
    first = [argument for each in overloads for argument in schema_of(each).arguments[:1]]
    return any(argument.alias_info and not argument.alias_info.is_write for argument in first)


class View:
    """A parameter as a chain of operations shows it.

    Attributes:
        dims: the digits of each dimension.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.dims = digits_of(shape)
        self._pieces: list[Dims | None] | None = None  # what a split gives, until one of them is taken

    def see_through(self, node: fx.Node) -> bool:
        """Go on to what a node shows of the present view; False where that is not known."""
        name = operation(node, node.graph)
        if self._pieces is not None:
            index = node.args[1] if name == GETITEM else None
            known = isinstance(index, int) and -len(self._pieces) <= index < len(self._pieces)
            dims = self._pieces[index] if known else None  # type: ignore[index]
            self._pieces = None
        elif name in PICKS:
            dims = _picked(node, name, self.dims)
        else:
            whole = torch.empty([dim_size(dim) for dim in self.dims], device="meta")
            views = _views(node, name, whole)
            if isinstance(views, list):
                self._pieces = [_digits(view, self.dims) for view in views]
                return True
            dims = None if views is None else _digits(views, self.dims)
        if dims is None:
            return False
        self.dims = dims
        return True


def _views(node: fx.Node, name: str, whole: torch.Tensor) -> torch.Tensor | list[torch.Tensor] | None:
    """What a node's operation gives of a tensor, one view of it or several; None where it gives anything else."""
    try:
        args: Any = fx.map_arg(node.args[1:], _number)
        kwargs = fx.map_arg(node.kwargs, _number)
        if name == "expand":
            args = (_expanded(args, whole.shape),)
        if isinstance(node.target, OpOverload):
            given = node.target(whole, *args, **kwargs)
        else:
            given = whole[args[0]] if name == GETITEM else getattr(whole, name)(*args, **kwargs)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # a size or a number is not known
        return None
    several, home = isinstance(given, (list, tuple)), storage_address(whole)
    views = list(given) if several else [given]
    shown = all(storage_address(view) == home and view.dtype == whole.dtype for view in views)
    return None if not shown else views if several else views[0]


def _number(node: fx.Node) -> int:
    """The number that a node gives, as far as it is known."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{node.name} is a tensor")
    return value if isinstance(value, int) else UNKNOWN


def _expanded(args: Sequence[object], shape: Sequence[int]) -> list[int]:
    """Sizes to expand to, in which one that is not known leaves a dimension that has a size as it is."""
    sizes = list(args[0] if isinstance(args[0], (list, tuple)) else args)
    for at in range(1, len(shape) + 1):
        if sizes[-at] == UNKNOWN and shape[-at] != 1:
            sizes[-at] = -1
    return sizes


def _digits(view: torch.Tensor, dims: Dims) -> Dims | None:
    """The digits of a view of a contiguous tensor with given digits; None where a dimension crosses them."""
    digits, unit = [], 1  # from the innermost: stride in the parameter, entries, and stride in the contiguous tensor
    for stride, entries in reversed([digit for dim in dims for digit in dim]):
        digits.append((stride, entries, unit))
        unit *= entries
    last = [view.storage_offset() // unit % entries for _, entries, unit in digits]  # entry of each digit that is read
    result: list[Dim] = []
    for size, step in zip(view.shape, view.stride(), strict=True):
        if size == 0:
            return None
        dim: list[Digit] = [(0, size)] if step == 0 and size != 1 else []
        rest = 1 if dim else size
        for i, (stride, entries, unit) in enumerate(digits):
            if rest == 1 or not unit <= step < unit * entries:
                continue
            pace, uneven = divmod(step, unit)
            count = min(rest, entries // pace)
            if uneven or rest % count or (rest > count and entries % pace):
                return None
            dim.insert(0, (stride * pace, count))
            last[i] += pace * (count - 1)
            rest, step = rest // count, unit * entries
        if rest != 1:
            return None
        result.append(tuple(dim))
    carries = any(entry >= entries for entry, (_, entries, _) in zip(last, digits, strict=True))
    return None if carries else tuple(result)


def _picked(node: fx.Node, name: str, dims: Dims) -> Dims | None:
    """Dimensions of which one has entries that another tensor chooses."""
    if name == "index_select":
        at = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
        if not isinstance(at, int):
            return None
        at, ranks = at % len(dims), 1
    else:
        indices = node.args[1]
        if not isinstance(indices, (list, tuple)):
            return None
        given = [i for i, index in enumerate(indices) if index is not None]
        if len(given) != 1:
            return None
        at, value = given[0], getattr(indices[given[0]], "meta", {}).get("val")
        ranks = value.dim() if isinstance(value, torch.Tensor) else 1
    return (*dims[:at], *[((0, UNKNOWN),)] * ranks, *dims[at + 1 :])
