"""Insert: at each site, inline the traced forward of an adapter beside (or in point of) the product.

    delta form      y  ->  y + term(x)                   the product stays as it is
    residual form   y  ->  x W_res^T + b + term(x)       the product is taken out; term then holds S h + delta
    weight form     W  ->  adapter(W)                    where the graph shows the weight and not its product

``x`` is seen as (rows, tokens, d_in), with as many rows as the adapter's coefficient has entries, so that one graph
serves a scalar coefficient and one per row, for inputs of any number of dimensions. The adapter's tensors stay in its
submodule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.node import Argument

from passes.infra.pass_base import Pass
from passes.infra.translation_validation import Reference
from passes.ir.adapter_trace import (
    INPUT,
    InlinableAdapter,
    adapter_at,
    adapter_tensors,
    inline,
    is_adapter,
    trace_adapter,
)
from passes.ir.erased_nodes import erase_product, set_erased_nodes
from passes.ir.module_utils import attribute
from passes.ir.provenance import Provenance, clear_provenance, provenance_of, set_provenance

aten = torch.ops.aten
SOURCE_METADATA = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


@dataclass(frozen=True)
class InsertionPoint:
    """Where an adapter goes.

    Attributes:
        key: of the site.
        path: submodule that holds the adapter.
        node: name of the product's node, or of the ``get_attr`` node of the weight.
        input: name of the node that is multiplied; the weight's own in weight form.
        added: name of the node that the product adds, or None.
        bias: name of the parameter that the product adds, or None.
    """

    key: str
    path: str
    node: str
    input: str
    added: str | None = None
    bias: str | None = None


class Insert(Pass):
    """Inline adapters, which are submodules of the graph module already, at their insertion points.

    Args:
        keep_base: keep the weights that only remainders stand for now.
    """

    def __init__(self, points: Sequence[InsertionPoint], *, keep_base: bool = True) -> None:
        self._points = points
        self.keep_base = keep_base

    def requires(self, graph_module: fx.GraphModule) -> str | None:
        """Every point exists and carries no adapter yet."""
        nodes = {node.name: node for node in graph_module.graph.nodes}
        stale = _stale_nodes(graph_module)
        for point in self._points:
            if point.node not in nodes or point.input not in nodes:
                return f"site {point.key!r}: the graph has no node {point.node!r}"
            if provenance_of(nodes[point.node]) is not None and nodes[point.node] not in stale:
                return f"site {point.key!r}: node {point.node!r} carries an adapter already"
            if not is_adapter(graph_module.get_submodule(point.path)):
                return f"site {point.key!r}: the submodule {point.path!r} is no adapter"
        return None

    def call(self, graph_module: fx.GraphModule) -> bool:
        """Insert in the order of execution, so that a later site reads what an earlier one became."""
        for node in _stale_nodes(graph_module):
            clear_provenance(node)
        graph = graph_module.graph
        current = {node.name: node for node in graph.nodes}
        order = {name: i for i, name in enumerate(current)}
        current |= {p.at: node for node in graph.nodes if (p := provenance_of(node)) and p.role == "out"}
        for point in sorted(self._points, key=lambda point: order[point.node]):
            adapter = adapter_at(graph_module, point.path)
            node = current[point.node]
            if point.input == point.node:
                out = insert_weight(point, adapter, node)
            elif adapter.base is None:
                out = insert_delta(point, adapter, node, current[point.input])
            else:
                out = insert_residual(point, adapter, node, current[point.input], current.get(point.added or ""))
            current[point.node] = out
        if not self.keep_base:
            self._forget_bases(graph_module)
        return bool(self._points)

    def comparison_points(self, graph_module: fx.GraphModule) -> dict[str, str]:
        """What translation validation compares: each product with its adapter."""
        return {point.node: point.key for point in self._points}

    def references(self, graph_module: fx.GraphModule) -> dict[str, tuple[str, Reference]]:
        """What each point should give: the product changed by the forward that an in-place host runs."""
        outs = {p.at: n.name for n in graph_module.graph.nodes if (p := provenance_of(n)) and p.role == "out"}
        adapters = {point.path: adapter_at(graph_module, point.path) for point in self._points}
        return {p.node: (outs.get(p.input, p.input), adapters[p.path].reference) for p in self._points}

    def _forget_bases(self, graph_module: fx.GraphModule) -> None:
        """Remove the weights that no node uses any more, by whichever of their names, and what still shows them."""
        shown = [node for node in graph_module.graph.nodes if node.op == "get_attr"]
        used = {id(attribute(graph_module, str(node.target))) for node in shown if node.users}
        for point in self._points:
            adapter = adapter_at(graph_module, point.path)
            path, _, local = adapter.weight_name.rpartition(".")
            if adapter.base is not None and id(attribute(graph_module, adapter.weight_name)) not in used:
                graph_module.get_submodule(path)._parameters.pop(local, None)
                adapter.keeps_base = False
        for node in shown:
            if not node.users and attribute(graph_module, str(node.target)) is None:
                graph_module.graph.erase_node(node)

    def ensures(self, graph_module: fx.GraphModule) -> str | None:
        """Every point has the output of an adapter."""
        tagged = [p for node in graph_module.graph.nodes if (p := provenance_of(node))]
        done = {p.at for p in tagged if p.role == "out"}
        missing = [point for point in self._points if point.node not in done]
        return f"site {missing[0].key!r} has no output" if missing else None


def _stale_nodes(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose provenance is of an earlier surgery: torch keeps it in a retrace, in which the adapters are gone."""
    live: set[fx.Node] = set()
    stale: set[fx.Node] = set()
    for node in reversed(graph_module.graph.nodes):
        provenance = provenance_of(node)
        if provenance is None:
            continue
        shared = provenance.role == "shared"
        alive = not live.isdisjoint(node.users) if shared else is_adapter(attribute(graph_module, provenance.path))
        (live if alive else stale).add(node)
    return stale


def insert_delta(point: InsertionPoint, adapter: InlinableAdapter, node: fx.Node, x: fx.Node) -> fx.Node:
    """Add the adapter's term to a product, whose own node is not touched; returns the sum's node."""
    build = _NodeBuilder(node, point, "delta", x)
    readers = list(node.users)
    set_provenance(node, build.provenance("base"))
    with node.graph.inserting_before(node.next):
        term = build.term(adapter, x)
        shaped = build.function(aten.reshape_as.default, (term, node), "term")
        out = build.function(aten.add.Tensor, (node, shaped), "out")
    build.finish(out, readers)
    return out


def insert_residual(
    point: InsertionPoint, adapter: InlinableAdapter, node: fx.Node, x: fx.Node, added: fx.Node | None
) -> fx.Node:
    """Replace a product by the remainder's product and the adapter's term; returns the sum's node."""
    build = _NodeBuilder(node, point, "residual", x, added)
    readers = list(node.users)
    assert adapter.base is not None
    graph, wide, narrow = node.graph, adapter.get_buffer(adapter.base).dtype, adapter.weight_dtype
    with graph.inserting_before(node.next):
        x = build.cast(x, narrow, wide)
        if added is None and point.bias is not None:
            added = build.tensor(point.bias)
        if added is not None:
            added = build.cast(added, narrow, wide)
        remainder = build.tensor(f"{point.path}.{adapter.base}")
        inside = (added,) if added is not None and point.bias is not None else ()
        base = build.function(aten.linear.default, (x, remainder, *inside), "base")
        set_provenance(base, build.provenance("base"))
        whole = base
        if added is not None and not inside:
            whole = build.function(aten.add.Tensor, (base, added), "biased")
            set_provenance(whole, build.provenance("biased"))
        term = build.term(adapter, x)
        shaped = build.function(aten.reshape_as.default, (term, whole), "term")
        out = build.cast(build.function(aten.add.Tensor, (whole, shaped), "out"), wide, narrow)
    build.finish(out, readers)
    set_erased_nodes(out, erase_product(graph, node))
    return out


def insert_weight(point: InsertionPoint, adapter: InlinableAdapter, node: fx.Node) -> fx.Node:
    """Let the adapter change a weight wherever the graph reads it; returns the changed weight's node."""
    build = _NodeBuilder(node, point, "weight", node)
    readers = list(node.users)
    set_provenance(node, build.provenance("base"))
    with node.graph.inserting_before(node.next):
        traced = trace_adapter(adapter, tuple(adapter.weight.shape), adapter.weight.dtype, rows=False)
        out = build.inline(traced, adapter, node)
    build.finish(out, readers)
    return out


class _NodeBuilder:
    """Makes the nodes of one instance of an adapter, each with its provenance and the product's source metadata."""

    def __init__(
        self, node: fx.Node, point: InsertionPoint, form: str, x: fx.Node, added: fx.Node | None = None
    ) -> None:
        self.node, self.point, self.form, self.graph = node, point, form, node.graph
        self.reads = (x.name, added.name if added else None)
        self.source = {name: node.meta[name] for name in SOURCE_METADATA if name in node.meta}

    def provenance(self, role: str) -> Provenance:
        point = self.point
        return Provenance(point.key, point.path, point.node, role, self.form, *self.reads)

    def tag(self, node: fx.Node) -> fx.Node:
        """Write to a new node where it comes from."""
        node.meta.update(self.source)
        set_provenance(node, self.provenance("body"))
        return node

    def function(self, target: Callable[..., object], args: tuple[Argument, ...], suffix: str) -> fx.Node:
        return self.tag(self.graph.create_node("call_function", target, args, {}, f"{self.point.node}_{suffix}"))

    def tensor(self, name: str) -> fx.Node:
        return self.tag(self.graph.create_node("get_attr", name, (), {}, name.replace(".", "_")))

    def cast(self, node: fx.Node, source: torch.dtype, target: torch.dtype) -> fx.Node:
        return node if source == target else self.function(aten.to.dtype, (node, target), "cast")

    def term(self, adapter: InlinableAdapter, x: fx.Node) -> fx.Node:
        """The adapter's forward on x, seen as (rows, tokens, d_in)."""
        d_in = adapter.features[0]
        coeff = self.tensor(f"{self.point.path}.{adapter.coefficient_name}")
        flat = self.function(aten.reshape.default, (coeff, [-1]), "flat")
        rows = self.function(aten.sym_size.int, (flat, 0), "rows")  # Dynamo traces no sym_numel
        # unflatten refuses rows that do not divide the batch
        split = self.function(aten.unflatten.int, (x, 0, [rows, -1]), "split")
        tokens = self.function(aten.reshape.default, (split, [rows, -1, d_in]), "tokens")
        dtype = adapter.weight_dtype if adapter.base is None else adapter.get_buffer(adapter.base).dtype
        return self.inline(
            trace_adapter(adapter, (5, 7, d_in), dtype), adapter, tokens, {adapter.coefficient_name: flat}
        )

    def inline(
        self, traced: fx.Graph, adapter: InlinableAdapter, x: fx.Node, known: dict[str, fx.Node] | None = None
    ) -> fx.Node:
        values: dict[str, Callable[[], fx.Node]] = {INPUT: lambda: x}
        for name in adapter_tensors(adapter):
            if known and name in known:
                values[name] = lambda name=name: known[name]  # type: ignore[misc]
            else:
                values[name] = lambda name=name: self.tensor(f"{self.point.path}.{name}")  # type: ignore[misc]
        return inline(self.graph, traced, values, self.point.node, self.tag)

    def finish(self, out: fx.Node, readers: Sequence[fx.Node]) -> None:
        """Let what read the product read the sum, which has the product's shape and dtype."""
        for reader in readers:
            reader.replace_input_with(self.node, out)
        set_provenance(out, self.provenance("out"))
        for name in ("val", "tensor_meta", "example_value"):
            if name in self.node.meta:
                out.meta[name] = self.node.meta[name]
