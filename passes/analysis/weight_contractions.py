"""Products with a weight that is best changed as a whole: stacks, 1x1 convolutions, views, slices, left operands.

A change of the weight itself is right whatever the product is, so that all that has to be read off a product is which
dimensions of the weight it sums over. One rule per operation gives the candidates, and
:mod:`passes.analysis.operands` follows them to a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import Argument

from passes.analysis.operands import Lookup, Matrices, Operand, follow, see_matrices, sizes_of
from passes.analysis.residual_stream import operation
from passes.ir.torch_internals import Convolution

Label = Callable[[Operand], str]


class _NoMatrixError(Exception):
    """Why a product has no matrix; never leaves this module."""


@dataclass(frozen=True)
class WeightRewrite:
    """A product whose weight is changed as a whole: the other operand, the parameter as matrices, and the bias."""

    input: Any
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
            matrices = see_matrices(operand, label(operand), tensor.shape)
        except _NoMatrixError as reason:
            return str(reason)
        return matrices if isinstance(matrices, str) else WeightRewrite(other, operand.weight, matrices, bias)
    return None


def pointwise(module: nn.Module) -> bool | str:
    """Whether a module is a convolution of single positions in one group; a sentence says why another one is not."""
    if not isinstance(module, Convolution):
        return False
    kind = type(module).__name__.lower()
    if "forward" in vars(module) or type(module).forward not in (
        nn.Conv1d.forward,
        nn.Conv2d.forward,
        nn.Conv3d.forward,
    ):
        return f"{kind} with a parameter: transposed, or with a forward of its own"
    return _kernel(kind, list(module.kernel_size), module.groups) or True


def _kernel(kind: str, sizes: list[int], groups: object) -> str:
    if any(size != 1 for size in sizes):
        return f"{kind} with a parameter: its kernel of {'x'.join(map(str, sizes))} mixes positions"
    if groups != 1:
        return f"{kind} with a parameter: its {groups} groups each see a part of the channels"
    return ""


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
    operands: Any = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
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
    kind = operation(node, node.graph)
    at, whole = (8, node.args[6]) if kind == "convolution" else (6, False)
    groups = node.args[at] if len(node.args) > at else node.kwargs.get("groups", 1)
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if whole:
        _transposed(node)

    def label(w: Operand) -> str:
        if reason := _kernel(kind, sizes_of(w)[2:], groups):
            raise _NoMatrixError(reason)
        return "OI" + "S" * (len(w.dims) - 2)

    yield node.args[1], node.args[0], label, bias


def _transposed(node: fx.Node) -> Iterator[Candidate]:
    raise _NoMatrixError(f"{operation(node, node.graph)} with a parameter: a transposed convolution")


RULES: dict[str, Callable[[fx.Node], Iterator[Candidate]]] = {
    **dict.fromkeys(["mm", "matmul", "bmm", "mv", "grouped_mm"], _matmul(0)),
    **dict.fromkeys(["addmm", "baddbmm", "addbmm", "addmv"], _matmul(1)),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d", "convolution"], _convolution),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _transposed),
    "linear": _linear, "inner": _inner, "tensordot": _tensordot, "einsum": _einsum,
}  # fmt: skip
