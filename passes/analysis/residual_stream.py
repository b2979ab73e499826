"""Which products write to the residual stream, read off the dataflow and not from names.

A residual addition is ``x + f(x)``: one operand (the *stream*) is an ancestor of the other (the *branch*). The writers
of the stream are the last products of the branch: those that reach the addition through linear, elementwise and
normalising operations only, without another product, an attention or a nonlinearity in between.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import fx

from passes.ir.parameter_names import tensor_name

aten = torch.ops.aten

VIEWS = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "alias",
    "to", "_to_copy", "type_as", "float", "dropout", "native_dropout", "detach", "identity",
}  # fmt: skip
LINEAR = VIEWS | {
    "add", "sub", "mul", "div", "neg", "sum", "permute", "transpose", "slice", "getitem", "expand", "cat", "index",
    "index_add", "layer_norm", "native_layer_norm", "rms_norm", "layernorm", "rmsnorm", "pow", "mean",
    "rsqrt", "sqrt", "reciprocal", "var", "roll", "pad", "where", "stack", "split", "unbind", "select",
}  # fmt: skip


def operation(node: fx.Node, graph: fx.Graph) -> str:
    """One lower-case name for an operation in any dialect: ATen overload, Python function, method or module."""
    if node.op == "call_module" and graph.owning_module is not None:
        return type(graph.owning_module.get_submodule(str(node.target))).__name__.lower()
    if node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", node.target)
        return getattr(packet, "__name__", str(packet)).lower().rstrip("_")
    return str(node.target).lower().rstrip("_")


def strip_views(node: fx.Node) -> fx.Node:
    """Follow reshapes, casts and dropout back to the value they show."""
    while node.op in ("call_function", "call_method", "call_module") and node.all_input_nodes:
        if operation(node, node.graph) not in VIEWS:
            break
        node = node.all_input_nodes[0]
    return node


def residual_writers(graph: fx.Graph, products: Container[fx.Node]) -> set[fx.Node]:
    """Find the products whose output is added to the stream that they read from.

    Args:
        graph: a normalised graph.
        products: the product nodes of interest.

    Returns:
        The subset of ``products`` that writes to a residual stream.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    writers: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target not in (aten.add.Tensor, aten.add_.Tensor) or len(node.all_input_nodes) != 2:
            continue
        one, other = node.all_input_nodes
        for stream, branch in ((one, other), (other, one)):
            if tensor_name(strip_views(stream)):  # a bias that several layers share is no stream
                continue
            ancestors = _terms(stream)
            if _depends(branch, ancestors, order):
                writers |= _last_products(branch, ancestors, products, graph)
                break
    return writers


def _terms(stream: fx.Node) -> set[fx.Node]:
    """The stream and what it is a sum or a multiple of: ``x`` in ``alpha x``, and in ``x + f(x)`` before ``+ g(x)``."""
    terms, pending = set(), [stream]
    while pending:
        node = pending.pop()
        if node in terms:
            continue
        terms.add(node)
        name = operation(node, node.graph)
        values = [n for n in node.all_input_nodes if not tensor_name(n)]
        if name in VIEWS and values:
            pending.append(values[0])
        elif name in ("add", "sub") or (name in ("mul", "div") and len(values) == 1):
            pending.extend(values)
    return terms


def _depends(node: fx.Node, ancestors: set[fx.Node], order: dict[fx.Node, int]) -> bool:
    oldest = min(order[a] for a in ancestors)
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current in ancestors:
            return True
        for source in current.all_input_nodes:
            if source not in seen and order[source] >= oldest:
                seen.add(source)
                pending.append(source)
    return False


def _last_products(branch: fx.Node, stop: set[fx.Node], products: Container[fx.Node], graph: fx.Graph) -> set[fx.Node]:
    last: set[fx.Node] = set()
    pending, seen = [branch], {branch}
    while pending:
        node = pending.pop()
        if node in stop:
            continue
        if node in products:
            last.add(node)
        elif operation(node, graph) in LINEAR:
            new = [source for source in node.all_input_nodes if source not in seen]
            seen.update(new)
            pending.extend(new)
    return last
