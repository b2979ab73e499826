"""Fold constants: compute, once, what depends on frozen tensors only.

Only what is listed as frozen is a constant. A tensor that requires a gradient never is, and neither is the result of an
operation that writes to a tensor, draws random numbers, keeps state, or is no plain ATen overload.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

import torch
from torch import fx

from passes.ir.erased_nodes import erase_unread
from passes.ir.module_utils import attribute, map_inputs
from passes.ir.provenance import provenance_of
from passes.ir.torch_internals import OpOverload, is_erased, schema_of


def is_pure(node: fx.Node) -> bool:
    """Whether a node computes the same from the same inputs, and nothing else."""
    target = node.target
    return (
        node.op == "call_function"
        and isinstance(target, OpOverload)
        and target.namespace == "aten"
        and not schema_of(target).is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not node.is_impure()
    )


def fold_constants(graph_module: fx.GraphModule, frozen: Collection[str]) -> int:
    """Replace the largest constant parts of a graph by stored tensors.

    Args:
        frozen: ``get_attr`` targets that may be taken for constants.

    Returns:
        How many tensors were stored.
    """
    values: dict[fx.Node, object] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target in frozen:
            tensor = attribute(graph_module, node.target)
            if isinstance(tensor, torch.Tensor) and not tensor.requires_grad:
                values[node] = tensor
        elif (sources := node.all_input_nodes) and all(source in values for source in sources) and is_pure(node):
            args, kwargs = map_inputs(node, values.__getitem__)
            with torch.no_grad(), torch.inference_mode(False):
                values[node] = node.target(*args, **kwargs)
    stored = 0
    for node in reversed(list(values)):
        if is_erased(node):
            continue
        if not node.users:
            graph_module.graph.erase_node(node)
        elif node.op != "get_attr" and not all(user in values for user in node.users):
            store(graph_module, node, values[node])
            stored += 1
    return stored


def store(graph_module: fx.GraphModule, node: fx.Node, value: object) -> str:
    """Let a node's readers read a stored value: a number in place, a tensor from a buffer of the node's adapter.

    Returns:
        The name of the buffer, empty for a number.
    """
    graph, provenance = node.graph, provenance_of(node)
    if not isinstance(value, torch.Tensor):
        for user in list(node.users):
            user.args, user.kwargs = map_inputs(user, lambda n: value if n is node else n)
        erase_unread(graph, [node])
        return ""
    path = provenance.path if provenance else ""
    module = graph_module.get_submodule(path)
    local = next(name for i in itertools.count() if not hasattr(module, name := f"folded_{i}"))
    module.register_buffer(local, value.detach().clone(), persistent=False)
    name = f"{path}.{local}".lstrip(".")
    with graph.inserting_before(node):
        new = graph.create_node("get_attr", name, (), {}, f"{node.name}_folded")
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    erase_unread(graph, [node])
    return name
