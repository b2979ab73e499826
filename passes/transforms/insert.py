"""Insert: at each site, inline the traced forward of an adapter beside (or in place of) the product.

    delta form      y  ->  y + term(x)                   the product stays as it is
    residual form   y  ->  x W_res^T + b + term(x)       the product is taken out; term then holds S h + delta
    weight form     W  ->  adapter(W)                    where the graph shows the weight and not its product

``x`` is seen as (rows, tokens, d_in), with as many rows as the adapter's knob has entries, so that one graph serves a
scalar knob and one per row, for inputs of any number of dimensions. The adapter's tensors stay in its submodule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from passes.infra.translation_validation import Reference
from passes.ir.adapter_trace import INPUT, adapter_tensors, inline, is_adapter, trace_adapter
from passes.ir.module_utils import attribute
from passes.ir.provenance import META, Erased, Mark, erase, mark_of

aten = torch.ops.aten
PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


@dataclass(frozen=True)
class Place:
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


class Insert:
    """Put adapters, which are submodules of the graph module already, on their places.

    Args:
        keep_base: keep the weights that only remainders stand for now.
    """

    name = "insert"

    def __init__(self, places: Sequence[Place], *, keep_base: bool = True) -> None:
        self._places = places
        self.keep_base = keep_base

    def requires(self, graph_module: fx.GraphModule) -> str | None:
        """Every place exists and carries no adapter yet."""
        nodes = {node.name: node for node in graph_module.graph.nodes}
        for place in self._places:
            if place.node not in nodes or place.input not in nodes:
                return f"site {place.key!r}: the graph has no node {place.node!r}"
            if mark_of(nodes[place.node]) is not None:
                return f"site {place.key!r}: node {place.node!r} carries an adapter already"
            if not is_adapter(graph_module.get_submodule(place.path)):
                return f"site {place.key!r}: the submodule {place.path!r} is no adapter"
        return None

    def call(self, graph_module: fx.GraphModule) -> bool:
        """Insert in the order of execution, so that a later site reads what an earlier one became."""
        graph = graph_module.graph
        current = {node.name: node for node in graph.nodes}
        order = {name: i for i, name in enumerate(current)}
        current |= {mark.at: node for node in graph.nodes if (mark := mark_of(node)) and mark.role == "out"}
        for place in sorted(self._places, key=lambda place: order[place.node]):
            adapter: Any = graph_module.get_submodule(place.path)
            node = current[place.node]
            if place.input == place.node:
                out = insert_weight(place, adapter, node)
            elif adapter.base is None:
                out = insert_delta(place, adapter, node, current[place.input])
            else:
                out = insert_residual(place, adapter, node, current[place.input], current.get(place.added or ""))
            current[place.node] = out
        if not self.keep_base:
            self._forget_bases(graph_module)
        return bool(self._places)

    def places(self, graph_module: fx.GraphModule) -> dict[str, str]:
        """What translation validation compares: each product with its adapter."""
        return {place.node: place.key for place in self._places}

    def references(self, graph_module: fx.GraphModule) -> dict[str, tuple[str, Reference]]:
        """What each place should give: the product changed by the forward that an in-place host runs."""
        outs = {mark.at: n.name for n in graph_module.graph.nodes if (mark := mark_of(n)) and mark.role == "out"}
        modules: dict[str, Any] = {place.path: graph_module.get_submodule(place.path) for place in self._places}
        return {p.node: (outs.get(p.input, p.input), modules[p.path].reference) for p in self._places}

    def _forget_bases(self, graph_module: fx.GraphModule) -> None:
        """Remove the weights that no node uses any more, by whichever of their names, and what still shows them."""
        shown = [node for node in graph_module.graph.nodes if node.op == "get_attr"]
        used = {id(attribute(graph_module, str(node.target))) for node in shown if node.users}
        for place in self._places:
            adapter: Any = graph_module.get_submodule(place.path)
            path, _, local = adapter.weight_name.rpartition(".")
            if adapter.base is not None and id(attribute(graph_module, adapter.weight_name)) not in used:
                graph_module.get_submodule(path)._parameters.pop(local, None)
                adapter.keeps_base = False
        for node in shown:
            if not node.users and attribute(graph_module, str(node.target)) is None:
                graph_module.graph.erase_node(node)

    def ensures(self, graph_module: fx.GraphModule) -> str | None:
        """Every place has the output of an adapter."""
        marks = [mark for node in graph_module.graph.nodes if (mark := mark_of(node))]
        done = {mark.at for mark in marks if mark.role == "out"}
        missing = [place for place in self._places if place.node not in done]
        return f"site {missing[0].key!r} has no output" if missing else None


def insert_delta(place: Place, adapter: nn.Module, node: fx.Node, x: fx.Node) -> fx.Node:
    """Add the adapter's term to a product, whose own node is not touched; returns the sum's node."""
    make = _Maker(node, place, "delta", x)
    readers = list(node.users)
    node.meta[META] = make.mark("base")
    with node.graph.inserting_before(node.next):
        term = make.term(adapter, x)
        shaped = make.function(aten.reshape_as.default, (term, node), "term")
        out = make.function(aten.add.Tensor, (node, shaped), "out")
    make.finish(out, readers)
    return out


def insert_residual(place: Place, adapter: Any, node: fx.Node, x: fx.Node, added: fx.Node | None) -> fx.Node:
    """Replace a product by the remainder's product and the adapter's term; returns the sum's node."""
    make = _Maker(node, place, "residual", x, added)
    readers = list(node.users)
    graph, wide, narrow = node.graph, adapter.get_buffer(adapter.base).dtype, adapter.weight_dtype
    with graph.inserting_before(node.next):
        x = make.cast(x, narrow, wide)
        if added is None and place.bias is not None:
            added = make.tensor(place.bias)
        if added is not None:
            added = make.cast(added, narrow, wide)
        remainder = make.tensor(f"{place.path}.{adapter.base}")
        inside = (added,) if added is not None and place.bias is not None else ()
        base = make.function(aten.linear.default, (x, remainder, *inside), "base")
        base.meta[META] = make.mark("base")
        whole = base
        if added is not None and not inside:
            whole = make.function(aten.add.Tensor, (base, added), "biased")
            whole.meta[META] = make.mark("biased")
        term = make.term(adapter, x)
        shaped = make.function(aten.reshape_as.default, (term, whole), "term")
        out = make.cast(make.function(aten.add.Tensor, (whole, shaped), "out"), wide, narrow)
    make.finish(out, readers)
    out.meta[META] = make.mark("out", erase(graph, node))
    return out


def insert_weight(place: Place, adapter: Any, node: fx.Node) -> fx.Node:
    """Let the adapter change a weight wherever the graph reads it; returns the changed weight's node."""
    make = _Maker(node, place, "weight", node)
    readers = list(node.users)
    node.meta[META] = make.mark("base")
    with node.graph.inserting_before(node.next):
        traced = trace_adapter(adapter, tuple(adapter.weight.shape), adapter.weight.dtype, rows=False)
        out = make.inline(traced, adapter, node)
    make.finish(out, readers)
    return out


class _Maker:
    """Makes the nodes of one occurrence, each with its mark and with where the product came from."""

    def __init__(self, node: fx.Node, place: Place, form: str, x: fx.Node, added: fx.Node | None = None) -> None:
        self.node, self.place, self.form, self.graph = node, place, form, node.graph
        self.reads = (x.name, added.name if added else None)
        self.provenance = {name: node.meta[name] for name in PROVENANCE if name in node.meta}

    def mark(self, role: str, erased: tuple[Erased, ...] = ()) -> Mark:
        place = self.place
        return Mark(place.key, place.path, place.node, role, self.form, *self.reads, erased)

    def dress(self, node: fx.Node) -> fx.Node:
        node.meta.update(self.provenance)
        node.meta[META] = self.mark("body")
        return node

    def function(self, target: Callable[..., Any], args: tuple[Any, ...], suffix: str) -> fx.Node:
        return self.dress(self.graph.create_node("call_function", target, args, {}, f"{self.place.node}_{suffix}"))

    def tensor(self, name: str) -> fx.Node:
        return self.dress(self.graph.create_node("get_attr", name, (), {}, name.replace(".", "_")))

    def cast(self, node: fx.Node, source: torch.dtype, target: torch.dtype) -> fx.Node:
        return node if source == target else self.function(aten.to.dtype, (node, target), "cast")

    def term(self, adapter: Any, x: fx.Node) -> fx.Node:
        """The adapter's forward on x, seen as (rows, tokens, d_in)."""
        d_in = adapter.features[0]
        knob = self.tensor(f"{self.place.path}.{adapter.knob}")
        flat = self.function(aten.reshape.default, (knob, [-1]), "flat")
        rows = self.function(aten.sym_size.int, (flat, 0), "rows")  # Dynamo traces no sym_numel
        # unflatten refuses rows that do not divide the batch
        split = self.function(aten.unflatten.int, (x, 0, [rows, -1]), "split")
        tokens = self.function(aten.reshape.default, (split, [rows, -1, d_in]), "tokens")
        dtype = adapter.weight_dtype if adapter.base is None else adapter.get_buffer(adapter.base).dtype
        return self.inline(trace_adapter(adapter, (5, 7, d_in), dtype), adapter, tokens, {adapter.knob: flat})

    def inline(
        self, traced: fx.Graph, adapter: nn.Module, x: fx.Node, known: dict[str, fx.Node] | None = None
    ) -> fx.Node:
        values: dict[str, Callable[[], fx.Node]] = {INPUT: lambda: x}
        for name in adapter_tensors(adapter):
            if known and name in known:
                values[name] = lambda name=name: known[name]  # type: ignore[misc]
            else:
                values[name] = lambda name=name: self.tensor(f"{self.place.path}.{name}")  # type: ignore[misc]
        return inline(self.graph, traced, values, self.place.node, self.dress)

    def finish(self, out: fx.Node, readers: Sequence[fx.Node]) -> None:
        """Let what read the product read the sum, which has the product's shape and dtype."""
        for reader in readers:
            reader.replace_input_with(self.node, out)
        out.meta[META] = self.mark("out")
        for name in ("val", "tensor_meta", "example_value"):
            if name in self.node.meta:
                out.meta[name] = self.node.meta[name]
