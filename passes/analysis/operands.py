"""Follow a parameter through views to the operand of a product, and see the parameter as a matrix or a stack of them.

A view of a parameter is written as one tuple of *digits* per dimension (:mod:`passes.analysis.weight_views`). Nothing
is computed: of a weight of any size only the shape is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from passes.analysis.residual_stream import operation
from passes.analysis.weight_views import Dims, View, can_be_followed
from passes.ir.parameter_names import tensor_name

Lookup = Callable[[str], torch.Tensor | None]

SAME = frozenset(
    ["to", "_to_copy", "alias", "detach", "type_as", "contiguous", "clone", "float", "double", "half", "bfloat16"]
)


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


def follow(node: object, parameter: Lookup) -> Operand | str | None:
    """Follow views and casts from an operand to a parameter.

    Args:
        node: of a normalised graph.
        parameter: gives the model's parameter of a name, or None.

    Returns:
        The operand; or why a view of a parameter cannot be followed; or None if it is no view of a parameter.
    """
    steps: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        if not node.args or not (operation(node, node.graph) in SAME or can_be_followed(node)):
            return None
        steps.append(node)
        node = node.args[0]
    read = tensor_name(node) if isinstance(node, fx.Node) else None
    tensor = None if read is None else parameter(read)
    if read is None or tensor is None:
        return None
    view = View(tensor.shape)
    for step in reversed(steps):
        name = operation(step, step.graph)
        if name not in SAME and not view.see_through(step):
            return f"the parameter {read!r} reaches the product through a {name} that cannot be followed"
    return Operand(read, view.dims)


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
    digits = [
        (stride, size, label)
        for dim, label in zip(operand.dims, labels, strict=True)
        for stride, size in dim
        if stride and size != 1
    ]
    edges = sorted({math.prod(shape[i:]) for i in range(len(shape) + 1)})
    parts: list[tuple[str, int]] = []
    top = math.prod(shape)
    for stride, size, label in sorted(digits, reverse=True):
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
