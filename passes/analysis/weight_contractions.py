"""Products with a weight that is best changed as a whole: stacks, convolutions, views, slices, left operands.

A change of the weight itself is right whatever the product is, so that all that has to be read off a product is which
dimensions of the weight it sums over. One rule per operation gives the candidates, and
:mod:`passes.analysis.operands` follows them to a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import Argument

from passes.analysis.operands import Lookup, Matrices, Operand, follow, see_matrices
from passes.analysis.residual_stream import operation
from passes.ir.torch_internals import Convolution

Label = Callable[[Operand], str]
FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
TRANSPOSED = "a transposed convolution, whose kernel spreads inputs over outputs"


class _NoMatrixError(Exception):
    """Why a product has no matrix; never leaves this module."""


@dataclass(frozen=True)
class WeightRewrite:
    """A product whose weight is changed as a whole: the other operand, the parameter as matrices, and the bias."""

    input: Argument
    weight: str
    matrices: Matrices
    bias: Argument = None


def read_weight_rewrite(node: fx.Node, parameter: Lookup) -> WeightRewrite | str | None:
    """Read a product with a parameter, of any form.

    Args:
        node: of a normalised graph.
        parameter: gives the model's parameter of a name, or None.

    Returns:
        The product; or why it is none; or None where no operand is a view of a parameter.
    """
    name = operation(node, node.graph)
    name = "grouped_mm" if "grouped_mm" in name else name
    if name not in RULES:
        return None
    try:
        candidates = list(RULES[name](node))
    except _NoMatrixError as reason:
        return str(reason) if any(follow(n, parameter) for n in node.all_input_nodes) else None
    followed = [(follow(weight, parameter), other, label, bias) for weight, other, label, bias in candidates]
    if len(followed) == 2 and all(isinstance(operand, Operand) for operand, *_ in followed):
        return "both operands are parameters"
    for operand, other, label, bias in followed:
        if isinstance(operand, str):
            return operand
        if operand is None:
            continue
        tensor = parameter(operand.weight)
        assert tensor is not None
        try:
            matrices = _in_groups(see_matrices(operand, label(operand), tensor.shape), node)
        except _NoMatrixError as reason:
            return str(reason)
        return matrices if isinstance(matrices, str) else WeightRewrite(other, operand.weight, matrices, bias)
    return None


def is_unfolded(module: nn.Module) -> bool | str:
    """Whether a module is a convolution, whose weight is a matrix for unfolded inputs; a sentence says why not."""
    if not isinstance(module, Convolution):
        return False
    if module.transposed:
        return f"{type(module).__name__.lower()} with a parameter: {TRANSPOSED}"
    if "forward" in vars(module) or type(module).forward not in FORWARDS:
        return f"{type(module).__name__.lower()} with a parameter: it has a forward of its own"
    return True


def unfolded(shape: Sequence[int], groups: int) -> Matrices:
    """The weight of a convolution as the matrix that multiplies unfolded inputs, of several groups as a stack of them.

    Args:
        shape: (d_out, channels per group, *kernel).
    """
    d_in = math.prod(shape[1:])
    return Matrices(None if groups == 1 else groups, shape[0] // groups, d_in, "out_in")


Candidate = tuple[Argument, Argument, Label, Argument]


def _matmul(first: int) -> Callable[[fx.Node], Iterator[Candidate]]:
    """``x @ w`` and ``w @ x``, the left operand at a position."""

    def read(node: fx.Node) -> Iterator[Candidate]:
        left, right = node.args[first : first + 2]
        yield right, left, lambda w: "S" * (len(w.dims) - 2) + "IO"[: len(w.dims)], None
        yield left, right, lambda w: "S" * (len(w.dims) - 2) + "OI"[-len(w.dims) :], None

    return read


def _linear(node: fx.Node) -> Iterator[Candidate]:
    bias = node.args[2] if len(node.args) > 2 else None
    yield node.args[1], node.args[0], lambda w: "OI"[-len(w.dims) :], bias


def _inner(node: fx.Node) -> Iterator[Candidate]:
    left, right = node.args[:2]
    yield right, left, lambda w: "O" * (len(w.dims) - 1) + "I", None
    yield left, right, lambda w: "O" * (len(w.dims) - 1) + "I", None


def _tensordot(node: fx.Node) -> Iterator[Candidate]:
    if len(node.args) < 4:
        raise _NoMatrixError("tensordot with a parameter: its dimensions are not known")
    left, right, of_left, of_right = node.args[:4]

    def label(summed: Any) -> Label:
        return lambda w: "".join("I" if i in {d % len(w.dims) for d in summed} else "O" for i in range(len(w.dims)))

    yield right, left, label(of_right), None
    yield left, right, label(of_left), None


def _einsum(node: fx.Node) -> Iterator[Candidate]:
    operands = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    if not isinstance(node.args[0], str) or len(operands) != 2:
        raise _NoMatrixError(f"einsum with a parameter and {len(operands)} operands")
    inputs, _, output = node.args[0].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "->" not in node.args[0]:
        letters = sorted(set(inputs) - {",", "."})
        output = "".join(letter for letter in letters if inputs.count(letter) == 1)

    def label(term: str, other: str) -> Label:
        def labels(w: Operand) -> str:
            if len(set(term)) != len(term.replace("...", ".")):
                raise _NoMatrixError("einsum takes a diagonal of the parameter")
            if any(letter not in other and letter not in output for letter in term.replace("...", "")):
                raise _NoMatrixError("einsum sums over a dimension that only the parameter has")
            whole = term.replace("...", "." * (len(w.dims) - len(term.replace("...", ""))))
            kind = {(True, True): "S", (True, False): "I", (False, True): "O"}
            return "".join("S" if c == "." else kind[c in other, c in output] for c in whole)

        return labels

    yield operands[1], operands[0], label(terms[1], terms[0]), None
    yield operands[0], operands[1], label(terms[0], terms[1]), None


def _convolution(node: fx.Node) -> Iterator[Candidate]:
    if operation(node, node.graph) == "convolution" and node.args[6]:
        _transposed(node)
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    yield node.args[1], node.args[0], lambda w: "O" + "I" * (len(w.dims) - 1), bias


def _in_groups(matrices: Matrices | str, node: fx.Node) -> Matrices | str:
    """The matrices of a convolution's groups, each of which sees a part of the channels."""
    name = operation(node, node.graph)
    if name not in CONVOLUTIONS or isinstance(matrices, str):
        return matrices
    at = 8 if name == "convolution" else 6
    groups = node.args[at] if len(node.args) > at else node.kwargs.get("groups", 1)
    if groups == 1:
        return matrices
    if (
        not isinstance(groups, int)
        or matrices.stack is not None
        or matrices.layout != "out_in"
        or matrices.d_out % groups
    ):
        return f"{name} with a parameter: its {groups} groups do not divide the parameter as it is stored"
    return Matrices(groups, matrices.d_out // groups, matrices.d_in, "out_in")


def _transposed(node: fx.Node) -> Iterator[Candidate]:
    raise _NoMatrixError(f"{operation(node, node.graph)} with a parameter: {TRANSPOSED}")


CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")


RULES: dict[str, Callable[[fx.Node], Iterator[Candidate]]] = {
    **dict.fromkeys(["mm", "matmul", "bmm", "mv", "grouped_mm"], _matmul(0)),
    **dict.fromkeys(["addmm", "baddbmm", "addbmm", "addmv"], _matmul(1)),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _transposed),
    "linear": _linear, "inner": _inner, "tensordot": _tensordot, "einsum": _einsum,
}  # fmt: skip
