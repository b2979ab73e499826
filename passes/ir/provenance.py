"""What a graph remembers of its surgery: every inserted node carries a :class:`Mark`, grouped by occurrence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

META = "surgery"


@dataclass(frozen=True)
class Ref:
    """A node by its name, inside the arguments of an :class:`Erased` one."""

    name: str


@dataclass(frozen=True)
class Erased:
    """A node that was taken out of a graph and can be put back."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Mark:
    """What a node has to do with a site.

    Attributes:
        key: of the site.
        path: of the adapter's submodule.
        at: name that the product's node had before surgery; one site may stand at several.
        role: "base" (the product), "body" (the adapter), "biased" (base plus what is added to it, where the base cannot
            hold it), "out" (what the rest of the graph reads), "shared" (what several occurrences read; it belongs to
            none of them, its key names all their sites, and its path the module that holds its tensor).
        form: "delta", "residual" or "weight".
        input: name of the product's input when the adapter was inserted.
        added: name of the node that the product added, or None.
        erased: of the "out" node in residual form, the product and what only it read, in order.
    """

    key: str
    path: str
    at: str
    role: str
    form: str
    input: str
    added: str | None = None
    erased: tuple[Erased, ...] = ()


@dataclass
class Occurrence:
    """The nodes of one adapter at one product (or at one read of a weight), in order."""

    mark: Mark
    nodes: list[fx.Node] = field(default_factory=list)

    def of_role(self, role: str) -> fx.Node | None:
        """The node of a role that at most one node has."""
        return next((node for node in self.nodes if node.meta[META].role == role), None)

    @property
    def base(self) -> fx.Node:
        """The node of the product."""
        base = self.of_role("base")
        assert base is not None
        return base

    @property
    def out(self) -> fx.Node:
        """The node that the rest of the graph reads."""
        out = self.of_role("out")
        assert out is not None
        return out

    @property
    def input(self) -> fx.Node:
        """The node that is multiplied, as it is now."""
        node = self.base.args[0]
        assert isinstance(node, fx.Node)
        return self._uncast(node)

    @property
    def added(self) -> fx.Node | None:
        """The node that the product adds, as it is now; None where it adds nothing."""
        biased = self.of_role("biased")
        inside = (*self.base.args, None, None)[2]
        node = biased.args[1] if biased else inside
        return self._uncast(node) if isinstance(node, fx.Node) else None

    def _uncast(self, node: fx.Node) -> fx.Node:
        while node in self.nodes and node.target is torch.ops.aten.to.dtype:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node = source
        return node


def mark_of(node: fx.Node) -> Mark | None:
    """The mark of a node, or None."""
    return node.meta.get(META)


def occurrences(graph: fx.Graph, keys: Iterable[str] | None = None) -> list[Occurrence]:
    """All occurrences of adapters in a graph, in the order of execution.

    Args:
        keys: sites to keep to.
    """
    chosen = None if keys is None else set(keys)
    found: dict[tuple[str, str], Occurrence] = {}
    for node in graph.nodes:
        mark = mark_of(node)
        if mark is None or mark.role == "shared" or (chosen is not None and mark.key not in chosen):
            continue
        place = found.setdefault((mark.path, mark.at), Occurrence(mark))
        place.nodes.append(node)
        if mark.role == "out":
            place.mark = mark
    return list(found.values())


def erase(graph: fx.Graph, node: fx.Node) -> tuple[Erased, ...]:
    """Take out a product without users, and the transposes and casts of parameters that only it read.

    Returns:
        All that :func:`put_back` needs to make the product again, also what others still read.
    """
    gone: dict[str, Erased] = {}
    pending = [node]
    while pending:
        current = pending.pop()
        if current is not node and (current.name in gone or not _shows_a_parameter(current)):
            continue
        sources = current.all_input_nodes
        named: Any = lambda n: Ref(n.name)  # noqa: E731
        args, kwargs = (fx.map_arg(a, named) for a in (current.args, current.kwargs))
        gone.pop(current.name, None)
        gone[current.name] = Erased(current.name, current.op, current.target, args, kwargs, dict(current.meta))
        if not current.users:
            graph.erase_node(current)
        pending.extend(sources)
    return tuple(reversed(gone.values()))


def erase_unread(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase those of some nodes that nothing reads, and the inserted nodes that only they read."""
    pending = list(nodes)
    while pending:
        current = pending.pop()
        if not current._erased and not current.users:
            sources = [source for source in current.all_input_nodes if META in source.meta]
            graph.erase_node(current)
            pending.extend(sources)


def _shows_a_parameter(node: fx.Node) -> bool:
    """Whether a node is a parameter, or a transpose, cast or view of one."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def put_back(
    erased: Sequence[Erased], before: fx.Node, replaced: Mapping[str, fx.Node], names: dict[str, fx.Node]
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
    known |= {n: names[n] for n in wanted if n in names and not names[n]._erased and names[n] < before}
    with graph.inserting_before(before):
        for item in erased:
            if item.name not in known or item is erased[-1]:
                args, kwargs = (_resolve(value, known) for value in (item.args, item.kwargs))
                node = graph.create_node(item.op, item.target, args, kwargs, item.name)
                if item.name not in names or names[item.name]._erased:
                    node.name = item.name  # free again, though the graph still counts it as taken
                node.meta = dict(item.meta)
                known[item.name] = node
                names[item.name] = known[item.name]
    return known[erased[-1].name]


def _refs(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _refs(item)


def _resolve(value: Any, known: dict[str, fx.Node]) -> Any:
    if isinstance(value, Ref):
        return known[value.name]
    if isinstance(value, (tuple, list)):
        return type(value)(_resolve(item, known) for item in value)
    if isinstance(value, dict):
        return {key: _resolve(item, known) for key, item in value.items()}
    return value
