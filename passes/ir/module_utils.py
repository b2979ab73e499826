"""Graphs and modules: copies that share their tensors, attributes by name, and changes that no other model sees."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Argument

from passes.ir.torch_internals import copy_signature, graph_like


def attribute(root: nn.Module, target: str) -> object:
    """What a ``get_attr`` node gives, or None where there is no such attribute."""
    value: object = root
    for part in target.split("."):
        if not hasattr(value, part):
            return None
        value = getattr(value, part)
    return value


def tensor_at(root: nn.Module, target: str) -> torch.Tensor:
    """The tensor that a ``get_attr`` node gives."""
    value = attribute(root, target)
    assert isinstance(value, torch.Tensor)
    return value


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module of the same class with tables of its own that hold the same tensors and submodules."""
    new = type(module).__new__(type(module))
    for name, value in vars(module).items():
        vars(new)[name] = value.copy() if isinstance(value, (dict, OrderedDict, set)) else value
    return new


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


def map_inputs(node: fx.Node, change: Callable[[fx.Node], Any]) -> tuple[tuple[Argument, ...], dict[str, Argument]]:
    """The arguments and keywords of a node, with each node among them changed."""
    return fx.map_arg(node.args, change), fx.map_arg(node.kwargs, change)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph with the same nodes, names and metadata."""
    new = graph_like(graph)
    result = new.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(result, tuple)
    value, node = result
    output = new.output(value, type_expr=getattr(node, "type", None))
    output.meta = copy.copy(node.meta)
    copy_signature(graph, new)
    return new
