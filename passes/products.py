"""Rules that read a matrix product off one normalised node: ``y = x W^T + b`` with a parameter ``W``.

One rule per ATen operation, registered by :func:`rule`. A rule returns a :class:`Product`, or a sentence that says why
the node is none; it never guesses. Adding coverage is adding a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """One matrix product: the node that is multiplied, the parameter and its layout, the parameter added to it."""

    node: fx.Node
    input: fx.Node
    weight: str
    layout: str  # "out_in": y = x W^T (nn.Linear);  "in_out": y = x W (GPT-2's Conv1D, raw x @ w)
    bias: str | None


Lookup = Callable[[str], torch.Tensor | None]
RULES: dict[Any, Callable[[fx.Node, Lookup], Product | str]] = {}
UNCOVERED = {
    aten.bmm.default: "bmm",
    aten.baddbmm.default: "baddbmm",
    aten.einsum.default: "einsum",
    torch.einsum: "einsum",
    aten.bilinear.default: "bilinear",
    aten.conv1d.default: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv3d.default: "conv3d",
    aten.convolution.default: "convolution",
    aten._grouped_mm.default: "grouped_mm",
}


def rule(*targets: Any) -> Callable[[Callable[[fx.Node, Lookup], Product | str]], Any]:
    """Register a rule for ATen overloads."""

    def register(function: Callable[[fx.Node, Lookup], Product | str]) -> Any:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def read_product(node: fx.Node, parameter: Lookup) -> Product | str | None:
    """Read a node as a product.

    Args:
        node: a node of a normalised graph.
        parameter: gives the patient's parameter of a name, or None.

    Returns:
        The product, or the reason why this product is not a site, or None if the node is no product at all.
    """
    if node.op != "call_function":
        return None
    if node.target in RULES:
        return RULES[node.target](node, parameter)
    name = UNCOVERED.get(node.target)
    if name is None and "grouped_mm" in str(node.target):
        name = "grouped_mm"
    if name is None:
        return None
    operands = [n for n in node.all_input_nodes if _parameter(n, parameter)]
    return f"{name} with a parameter is not covered yet" if operands else "both operands are activations"


def _parameter(node: Any, parameter: Lookup) -> tuple[str, bool] | None:
    """Follow transposes, casts and aliases from an operand to a parameter: its name, and whether it is transposed."""
    transposed = False
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            name = str(node.target)
            return (name, transposed) if parameter(name) is not None else None
        if node.target in (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default):
            transposed = not transposed
        elif node.target not in (aten.to.dtype, aten._to_copy.default, aten.alias.default, aten.detach.default):
            return None
        node = node.args[0]
    return None


def _product(
    node: fx.Node, x: Any, weight: Any, bias: Any, *, times_transpose: bool, parameter: Lookup
) -> Product | str:
    found = _parameter(weight, parameter)
    if found is None:
        if _parameter(x, parameter):
            return "the parameter is the left operand: the product mixes rows, not features"
        is_constant = isinstance(weight, fx.Node) and weight.op == "get_attr"
        return "the operand is a constant, not a parameter" if is_constant else "both operands are activations"
    name, transposed = found
    tensor = parameter(name)
    if tensor is None or tensor.dim() != 2:
        return f"the parameter {name!r} is not a matrix"
    bias_name = None
    if isinstance(bias, fx.Node):
        found_bias = _parameter(bias, parameter)
        bias_name = found_bias[0] if found_bias else None
    layout = "out_in" if times_transpose != transposed else "in_out"
    return Product(node, x, name, layout, bias_name)


@rule(aten.linear.default)
def _linear(node: fx.Node, parameter: Lookup) -> Product | str:
    x, weight, bias = (*node.args, None)[:3]
    return _product(node, x, weight, bias, times_transpose=True, parameter=parameter)


@rule(aten.mm.default, aten.matmul.default)
def _matmul(node: fx.Node, parameter: Lookup) -> Product | str:
    x, weight = node.args[:2]
    return _product(node, x, weight, None, times_transpose=False, parameter=parameter)


@rule(aten.addmm.default)
def _addmm(node: fx.Node, parameter: Lookup) -> Product | str:
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return "addmm with alpha or beta"
    bias, x, weight = node.args[:3]
    return _product(node, x, weight, bias, times_transpose=False, parameter=parameter)
