"""Rules that read a matrix product off one normalised node: ``y = x W^T + b`` with a parameter ``W``.

One rule per ATen operation, registered by :func:`matmul_rule`. A rule returns a :class:`Product`, or a sentence that
says why the node is none; it never guesses. Adding coverage is adding a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.analysis.operands import Lookup, Matrices
from passes.analysis.weight_contractions import RULES as REWRITE_RULES
from passes.analysis.weight_contractions import WeightRewrite, read_weight_rewrite
from passes.ir.parameter_names import tensor_name
from passes.ir.torch_internals import HigherOrderOperator, OpOverload

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """One matrix product: its node, the node that is multiplied, the parameter and its layout, what is added to it.

    ``matrices`` is None where an adapter's term can be added to the product, ``y = x W^T``; else the weight is changed
    as a whole, and they say how it is seen as a matrix or a stack of matrices.
    """

    node: fx.Node
    input: fx.Node
    weight: str
    layout: str  # "out_in": y = x W^T (nn.Linear);  "in_out": y = x W (GPT-2's Conv1D, raw x @ w)
    bias: str | None
    added: fx.Node | None = None
    matrices: Matrices | None = None


Rule = Callable[[fx.Node, Lookup], Product | str]
RULES: dict[object, Rule] = {}
ACTIVATIONS = "both operands are activations"
UNCOVERED = {
    **dict.fromkeys(["bilinear", "addbilinear", "_trilinear"], "it multiplies two inputs"),
    **dict.fromkeys(["chain_matmul", "linalg_multi_dot"], "it multiplies more than two operands at once"),
    **dict.fromkeys(
        [
            "lstm",
            "gru",
            "rnn_tanh",
            "rnn_relu",
            "lstm_cell",
            "gru_cell",
            "rnn_tanh_cell",
            "rnn_relu_cell",
            "mkldnn_rnn_layer",
            "_cudnn_rnn",
            "_thnn_fused_lstm_cell",
            "_thnn_fused_gru_cell",
        ],
        "its products are inside one fused operation",
    ),
}


TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.matrix_H.default, aten.adjoint.default)
CASTS = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.alias.default, aten.detach.default,
    aten.type_as.default, aten.contiguous.default, aten.clone.default,
)  # fmt: skip


DTYPE_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)


def matmul_rule(*targets: OpOverload) -> Callable[[Rule], Rule]:
    """Register a rule for ATen overloads."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def read_product(node: fx.Node, parameter: Lookup) -> Product | str | None:
    """Read a node as a product.

    Args:
        node: a node of a normalised graph.
        parameter: gives the model's parameter of a name, or None.

    Returns:
        The product, or the reason why this product is not a site, or None if the node is no product at all.
    """
    if node.op != "call_function":
        return None
    plain = RULES[node.target](node, parameter) if node.target in RULES else None
    if isinstance(plain, Product):
        return plain
    rewrite = read_weight_rewrite(node, parameter)
    if isinstance(rewrite, WeightRewrite):
        return rewritten_product(node, rewrite, parameter)
    if rewrite is not None or plain is not None:
        return rewrite or plain
    packet = getattr(node.target, "overloadpacket", node.target)
    name = str(getattr(packet, "__name__", packet))
    if name in UNCOVERED:
        held = any(_parameter(n, parameter) for n in node.all_input_nodes)
        return f"{name} with a parameter: {UNCOVERED[name]}" if held else ACTIVATIONS
    if name not in REWRITE_RULES and "grouped_mm" not in name:
        return _of_unknown_kind(node, name, parameter)
    reasons = [_not_a_parameter(n, parameter) for n in node.all_input_nodes]
    return next((reason for reason in reasons if "parameter '" in reason), ACTIVATIONS)


def rewritten_product(node: fx.Node, rewrite: WeightRewrite, parameter: Lookup) -> Product:
    """The product of a weight that is changed as a whole."""
    bias = _parameter(rewrite.bias, parameter)
    name = bias[0] if bias else None
    assert isinstance(rewrite.input, fx.Node)
    return Product(node, rewrite.input, rewrite.weight, rewrite.matrices.layout, name, None, rewrite.matrices)


def _parameter(node: object, parameter: Lookup) -> tuple[str, bool] | None:
    """Follow transposes, casts and aliases from an operand to a parameter: its name, and whether it is transposed."""
    transposed = False
    while isinstance(node, fx.Node):
        if (name := tensor_name(node)) is not None:
            return (name, transposed) if parameter(name) is not None else None
        args: Any = node.args
        if node.target in TRANSPOSES:
            transposed = not transposed
        elif node.target in (aten.transpose.int, aten.swapaxes.default):
            transposed ^= (args[1] - args[2]) % 2 == 1
        elif node.target is aten.permute.default:
            transposed ^= args[1][0] % 2 == 1
        elif node.target not in CASTS:
            return None
        node = node.args[0]
    return None


def casts_its_weight(product: Product, dtype: torch.dtype) -> bool:
    """Whether the weight of a product, of the given dtype, is cast to another on the way to it."""
    for node in product.node.all_input_nodes:
        cast = False
        while node.op == "call_function" and node.all_input_nodes:
            wanted = node.args[1] if node.target is aten.to.dtype else node.kwargs.get("dtype")
            cast |= node.target in DTYPE_CASTS and wanted is not dtype
            node = node.all_input_nodes[0]
        if cast and tensor_name(node) == product.weight:
            return True
    return False


def _product(
    node: fx.Node, x: Any, weight: object, bias: object, *, times_transpose: bool, parameter: Lookup
) -> Product | str:
    read = _parameter(weight, parameter)
    if read is None:
        return _not_a_parameter(weight, parameter)
    name, transposed = read
    tensor = parameter(name)
    if tensor is None or tensor.dim() != 2:
        return f"the parameter {name!r} is not a matrix"
    if (other := _parameter(x, parameter)) is not None and other[0] == name:
        return "both operands are parameters"
    bias_name = None
    if isinstance(bias, fx.Node):
        read_bias = _parameter(bias, parameter)
        bias_name = read_bias[0] if read_bias else None
    layout = "out_in" if times_transpose != transposed else "in_out"
    return Product(node, x, name, layout, bias_name, bias if isinstance(bias, fx.Node) else None)


def _of_unknown_kind(node: fx.Node, name: str, parameter: Lookup) -> str | None:
    """Why an operation that is not torch's own is no site, where it reads a matrix; it may multiply by it."""
    foreign = isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "prims", "prim")
    if not foreign and not isinstance(node.target, HigherOrderOperator):
        return None
    reads = (_parameter(n, parameter) for n in node.all_input_nodes)
    matrices = [read for read in reads if read and _is_matrix(parameter(read[0]))]
    return f"{name} with a parameter: what it computes is not known" if matrices else None


def _is_matrix(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.dim() > 1


def _not_a_parameter(weight: object, parameter: Lookup) -> str:
    """Say what a second operand is that is no parameter: made of one, a constant, or an activation."""
    sources = _sources(weight)
    if sources is None:
        return ACTIVATIONS
    named = [name for name in sources if parameter(name) is not None]
    if named:
        return f"the operand is computed from the parameter {named[0]!r}"
    return "the operand is a constant, not a parameter"


def _sources(operand: object) -> list[str] | None:
    """The tensors of the model that an operand is computed from; None where an input is among what it is made of."""
    pending, seen, sources = [operand], set(), []
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if (name := tensor_name(node)) is not None:
            sources.append(name)
        elif node.op == "placeholder":
            return None
        pending.extend(node.all_input_nodes)
    return sources


def parameters_read(node: fx.Node, parameter: Lookup) -> list[str]:
    """The parameters that the operands of a product are, or are computed from alone."""
    names = [name for operand in node.all_input_nodes for name in _sources(operand) or ()]
    return [name for name in dict.fromkeys(names) if parameter(name) is not None]


@matmul_rule(aten.linear.default)
def _linear(node: fx.Node, parameter: Lookup) -> Product | str:
    x, weight, bias = (*node.args, None)[:3]
    return _product(node, x, weight, bias, times_transpose=True, parameter=parameter)


@matmul_rule(aten.mm.default, aten.matmul.default)
def _matmul(node: fx.Node, parameter: Lookup) -> Product | str:
    x, weight = node.args[:2]
    return _product(node, x, weight, None, times_transpose=False, parameter=parameter)


@matmul_rule(aten.addmm.default)
def _addmm(node: fx.Node, parameter: Lookup) -> Product | str:
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return "addmm with alpha or beta"
    bias, x, weight = node.args[:3]
    return _product(node, x, weight, bias, times_transpose=False, parameter=parameter)
