"""Nodes that a pass takes out of a graph so that it, or another pass, can put them back as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx.node import Target

from passes.ir.module_utils import map_inputs
from passes.ir.provenance import provenance_of
from passes.ir.torch_internals import is_erased

KEY = "surgery_erased"  # beside "custom", not in it: what it holds is no JSON, and names nodes of this graph alone


@dataclass(frozen=True)
class NodeRef:
    """A node by its name, inside the arguments of an :class:`ErasedNode`."""

    name: str


@dataclass(frozen=True)
class ErasedNode:
    """A node that was taken out of a graph and can be put back."""

    name: str
    op: str
    target: Target
    args: object  # as a node's, with a NodeRef for each node
    kwargs: object
    meta: dict[str, object] = field(repr=False, compare=False)


def set_erased_nodes(node: fx.Node, erased: Sequence[ErasedNode]) -> None:
    """Note, at the node that replaces a product, the product and what only it read, in order."""
    node.meta[KEY] = tuple(erased)


def erased_nodes_of(node: fx.Node) -> tuple[ErasedNode, ...]:
    """What :func:`set_erased_nodes` noted at a node."""
    erased: tuple[ErasedNode, ...] = node.meta.get(KEY, ())
    return erased


def erase_product(graph: fx.Graph, node: fx.Node) -> tuple[ErasedNode, ...]:
    """Take out a product without users, and the transposes and casts of parameters that only it read.

    Returns:
        All that :func:`restore_product` needs to make the product again, also what others still read.
    """
    erased: dict[str, ErasedNode] = {}
    pending = [node]
    while pending:
        current = pending.pop()
        if current is not node and (current.name in erased or not _shows_a_parameter(current)):
            continue
        sources = current.all_input_nodes
        args, kwargs = map_inputs(current, lambda n: NodeRef(n.name))
        erased.pop(current.name, None)
        erased[current.name] = ErasedNode(current.name, current.op, current.target, args, kwargs, dict(current.meta))
        if not current.users:
            graph.erase_node(current)
        pending.extend(sources)
    return tuple(reversed(erased.values()))


def erase_unread(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase those of some nodes that nothing reads, and the inserted nodes that only they read."""
    pending = list(nodes)
    while pending:
        current = pending.pop()
        if not is_erased(current) and not current.users:
            sources = [source for source in current.all_input_nodes if provenance_of(source) is not None]
            graph.erase_node(current)
            pending.extend(sources)


def _shows_a_parameter(node: fx.Node) -> bool:
    """Whether a node is an attribute, or a transpose, cast or view of one: a placeholder is not ours to erase."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def restore_product(
    erased: Sequence[ErasedNode], before: fx.Node, replaced: Mapping[str, fx.Node], names: dict[str, fx.Node]
) -> fx.Node:
    """Make an erased product again, from nodes that are still there and new ones for those that are not.

    Args:
        before: the node to put it before.
        replaced: nodes that now stand for names that the product read.
        names: all nodes of the graph by name, brought up to date here.

    Returns:
        The product's node.
    """
    graph, known = before.graph, dict(replaced)
    wanted = {ref.name for item in erased for ref in _refs((item.args, item.kwargs))} - set(known)
    known |= {n: names[n] for n in wanted if n in names and not is_erased(names[n]) and names[n] < before}
    with graph.inserting_before(before):
        for item in erased:
            if item.name not in known or item is erased[-1]:
                args, kwargs = (_resolve(value, known) for value in (item.args, item.kwargs))
                node = graph.create_node(item.op, item.target, args, kwargs, item.name)
                if item.name not in names or is_erased(names[item.name]):
                    node.name = item.name  # free again, though the graph still counts it as taken
                node.meta = dict(item.meta)
                known[item.name] = node
                names[item.name] = known[item.name]
    return known[erased[-1].name]


def _refs(value: object) -> Iterator[NodeRef]:
    if isinstance(value, NodeRef):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _refs(item)


def _resolve(value: Any, known: dict[str, fx.Node]) -> Any:
    if isinstance(value, NodeRef):
        return known[value.name]
    if isinstance(value, (tuple, list)):
        return type(value)(_resolve(item, known) for item in value)
    if isinstance(value, dict):
        return {key: _resolve(item, known) for key, item in value.items()}
    return value
