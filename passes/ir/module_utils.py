"""Graphs and modules: copies that share their tensors, attributes by name, and changes that no other model sees."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn


def attribute(root: nn.Module, target: str) -> Any:
    """What a ``get_attr`` node gives, or None where there is no such attribute."""
    found: Any = root
    for part in target.split("."):
        if not hasattr(found, part):
            return None
        found = getattr(found, part)
    return found


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module of the same class with tables of its own that hold the same tensors and submodules."""
    twin = type(module).__new__(type(module))
    for name, value in vars(module).items():
        vars(twin)[name] = value.copy() if isinstance(value, (dict, OrderedDict, set)) else value
    return twin


def private_module(root: nn.Module, path: str, shared: Mapping[str, nn.Module | None] | None = None) -> nn.Module:
    """Replace every module on a path by a shallow copy, and return the last: the original tree is not written.

    Args:
        shared: the root's children as another model may have them; a module that is none of theirs is not copied again.
    """
    current, always = root, shared is None
    for part in filter(None, path.split(".")):
        child = current.get_submodule(part)
        other = (shared or {}).get(part)
        if always or child is other:
            child = shallow_copy(child)
            current._modules[part] = child
        shared = other._modules if other is not None else {}
        current = child
    return current


def set_parameter(
    root: nn.Module,
    name: str,
    tensor: torch.Tensor,
    *,
    requires_grad: bool,
    shared: Mapping[str, nn.Module | None] | None = None,
) -> None:
    """Register a parameter under a name; modules on the way are copied, since another model may share them.

    Args:
        shared: the root's children as another model may have them, as in :func:`private_module`.
    """
    path, _, local = name.rpartition(".")
    owner = private_module(root, path, shared)
    owner._parameters[local] = nn.Parameter(tensor, requires_grad=requires_grad)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph with the same nodes, names and metadata."""
    twin = fx.Graph(tracer_cls=graph._tracer_cls)
    output = twin.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    value, node = output
    new = twin.output(value, type_expr=getattr(node, "type", None))
    new.meta = copy.copy(node.meta)
    twin._codegen = copy.copy(graph._codegen)
    return twin
