"""Bring every capture dialect to one: linear products, additions and transposes as ATen nodes on ``get_attr`` weights.

``torch.export`` already speaks ATen. ``fx.symbolic_trace`` says ``call_module nn.Linear``, ``F.linear``,
``operator.add`` or ``x.matmul(w)`` for the same things. A rewritten ``call_module`` leaves the module's path in
``node.meta["called_module"]``, since the graph alone no longer shows that the module itself was called.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx

from passes.infra.pass_base import Pass
from passes.ir.linear_modules import linear_layout
from passes.ir.torch_internals import OpOverload, schema_of

aten = torch.ops.aten

FUNCTIONS: dict[Callable[..., object], OpOverload] = {
    F.linear: aten.linear.default,
    torch.matmul: aten.matmul.default,
    operator.matmul: aten.matmul.default,
    torch.mm: aten.mm.default,
    torch.addmm: aten.addmm.default,
    torch.bmm: aten.bmm.default,
    torch.add: aten.add.Tensor,
    operator.add: aten.add.Tensor,
    operator.iadd: aten.add_.Tensor,
    torch.t: aten.t.default,
    torch.transpose: aten.transpose.int,
}
METHODS: dict[str, OpOverload] = {
    "matmul": aten.matmul.default,
    "mm": aten.mm.default,
    "addmm": aten.addmm.default,
    "bmm": aten.bmm.default,
    "add": aten.add.Tensor,
    "add_": aten.add_.Tensor,
    "t": aten.t.default,
    "transpose": aten.transpose.int,
}


class Normalize(Pass):
    """Rewrite the products and additions of any dialect to ATen overloads, keeping names and metadata."""

    def call(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite in place; nodes that have no ATen counterpart here stay as they are."""
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.op == "call_module":
                modified |= self._inline_linear(graph_module, node)
            elif node.op == "call_function" and node.target in SUMS and _is_sum_of_sizes(node):
                continue
            elif node.op == "call_function" and node.target in FUNCTIONS:
                modified |= _retarget(node, FUNCTIONS[node.target])
            elif node.op == "call_method" and node.target in METHODS:
                modified |= _retarget(node, METHODS[node.target])
            elif node.op == "call_function" and node.target is getattr and node.args[1:] in (("T",), ("mT",)):
                target = aten.numpy_T.default if node.args[1] == "T" else aten.mT.default
                node.args = node.args[:1]
                modified |= _retarget(node, target)
        return modified

    def ensures(self, graph_module: fx.GraphModule) -> str | None:
        """No plain linear module may be left as a call."""
        for node in graph_module.graph.nodes:
            if node.op == "call_module" and linear_layout(graph_module.get_submodule(node.target)):
                return f"node {node.name!r} still calls the linear module {node.target!r}"
        return None

    @staticmethod
    def _inline_linear(graph_module: fx.GraphModule, node: fx.Node) -> bool:
        module = graph_module.get_submodule(str(node.target))
        layout = linear_layout(module)
        if layout is None:
            return False
        path = node.target
        graph = graph_module.graph
        with graph.inserting_before(node):
            weight = graph.get_attr(f"{path}.weight")
            if layout == "in_out":
                weight = graph.call_function(aten.t.default, (weight,))
            bias = graph.get_attr(f"{path}.bias") if module.bias is not None else None
        inputs = (*node.args, *node.kwargs.values())
        node.op, node.target = "call_function", aten.linear.default
        node.args, node.kwargs = (inputs[0], weight, bias), {}
        node.meta["called_module"] = path
        return True


SUMS = (operator.add, operator.iadd)
SIZES = ("size", "dim", "numel", "item", "stride", "ndimension", "nelement", "tolist")
INTEGERS = (operator.getitem, operator.floordiv, operator.mul, operator.sub, operator.mod, operator.neg, *SUMS)


def _is_size(value: object) -> bool:
    """Whether an operand of ``+`` is a shape, a number read off a tensor, or a sequence: no tensor to add."""
    if isinstance(value, (tuple, list)):
        return True
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method":
        return value.target in SIZES
    if value.op == "call_function" and value.target is getattr:
        return value.args[1] in ("shape", "ndim")
    sources = value.all_input_nodes
    return value.op == "call_function" and value.target in INTEGERS and bool(sources) and all(map(_is_size, sources))


def _is_sum_of_sizes(node: fx.Node) -> bool:
    return all(_is_size(a) for a in node.args if isinstance(a, (fx.Node, tuple, list)))


def _retarget(node: fx.Node, target: OpOverload) -> bool:
    """Point a node at an ATen overload, with all arguments positional where the Python call named them."""
    arguments = schema_of(target).arguments
    names = [argument.name for argument in arguments if not argument.kwarg_only]
    kwargs = {("self" if name == "input" and name not in names else name): v for name, v in node.kwargs.items()}
    positional = list(node.args)
    for name in names[len(positional) :]:
        if name not in kwargs:
            break
        positional.append(kwargs.pop(name))
    node.op, node.target = "call_function", target
    node.args, node.kwargs = tuple(positional), kwargs
    return True
