"""The graph dialect as an executable specification: what every graph keeps to between any two passes.

Each rule is one function that yields what is wrong; :func:`check_graph` runs them all.
:meth:`passes.infra.pass_base.Pass.run` does so after every pass in debug mode (``SURGERY_DEBUG=1``, or ``debug=True``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import fx, nn

from passes.ir.adapter_trace import is_adapter
from passes.ir.module_utils import attribute
from passes.ir.provenance import Provenance, adapter_instances, provenance_entry, provenance_of
from passes.ir.torch_internals import OpOverload, schema_of

aten = torch.ops.aten
Rule = Callable[[fx.GraphModule], Iterator[str]]
RULES: list[Rule] = []
ROLES, FORMS = ("base", "body", "biased", "out", "shared"), ("delta", "residual", "weight")


def dialect_rule(function: Rule) -> Rule:
    """Register a rule of the specification."""
    RULES.append(function)
    return function


def check_graph(graph_module: fx.GraphModule) -> list[str]:
    """All violations of the specification, each naming its node."""
    return [problem for each in RULES for problem in each(graph_module)]


@dialect_rule
def ends_with_one_output(graph_module: fx.GraphModule) -> Iterator[str]:
    """Exactly one output, and it is the last node."""
    outputs = [i for i, node in enumerate(graph_module.graph.nodes) if node.op == "output"]
    if outputs != [len(graph_module.graph.nodes) - 1]:
        yield f"expected one output at the end, found outputs at {outputs} of {len(graph_module.graph.nodes)} nodes"


@dialect_rule
def names_are_unique(graph_module: fx.GraphModule) -> Iterator[str]:
    """No two nodes share a name."""
    for name, n in Counter(node.name for node in graph_module.graph.nodes).items():
        if n > 1:
            yield f"{n} nodes are named {name!r}"


@dialect_rule
def nodes_read_earlier_nodes(graph_module: fx.GraphModule) -> Iterator[str]:
    """Nodes stand after what they read, and know their readers."""
    seen: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                yield f"node {node.name!r} reads {source.name!r}, which does not stand before it"
            if node not in source.users:
                yield f"node {source.name!r} does not know its reader {node.name!r}"
        seen.add(node)


@dialect_rule
def attributes_exist(graph_module: fx.GraphModule) -> Iterator[str]:
    """Every ``get_attr`` gives something, and every ``call_module`` calls a module."""
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and attribute(graph_module, node.target) is None:
            yield f"node {node.name!r} reads {node.target!r}, which does not exist"
        if node.op == "call_module" and not isinstance(attribute(graph_module, node.target), nn.Module):
            yield f"node {node.name!r} calls {node.target!r}, which is no module"


@dialect_rule
def inserted_nodes_are_aten(graph_module: fx.GraphModule) -> Iterator[str]:
    """What surgery inserts is ATen overloads on tensors of the adapter, none of which writes to a tensor."""
    for node in graph_module.graph.nodes:
        provenance = provenance_of(node)
        if provenance is None or provenance.role == "base":
            continue
        if node.op == "call_function":
            schema = schema_of(node.target)
            if not isinstance(node.target, OpOverload) or schema is None:
                yield f"site {provenance.key!r}: node {node.name!r} calls {node.target!r}, which is no ATen overload"
            elif schema.is_mutable:
                yield f"site {provenance.key!r}: node {node.name!r} calls {node.target}, which writes to a tensor"
        elif node.op != "get_attr":
            yield f"site {provenance.key!r}: node {node.name!r} is a {node.op}"


@dialect_rule
def inserted_nodes_are_read(graph_module: fx.GraphModule) -> Iterator[str]:
    """No inserted node is dead, but for the output of a product that nothing read."""
    for node in graph_module.graph.nodes:
        provenance = provenance_of(node)
        if provenance and provenance.role in ("body", "shared") and not node.users:
            yield f"site {provenance.key!r}: node {node.name!r} is dead"


@dialect_rule
def adapters_are_whole(graph_module: fx.GraphModule) -> Iterator[str]:
    """Each instance has a base, an output, and an adapter of the same site that it reads."""
    for instance in adapter_instances(graph_module.graph):
        provenance: Provenance = instance.provenance
        lacking = [role for role in ("base", "out") if instance.of_role(role) is None]
        if lacking:
            yield f"site {provenance.key!r} at {provenance.at!r} lacks its {lacking[0]!r} node"
        elif not is_adapter(attribute(graph_module, provenance.path)):
            yield f"site {provenance.key!r} at {provenance.at!r}: {provenance.path!r} is no adapter"
        elif not any(n.op == "get_attr" and str(n.target).startswith(f"{provenance.path}.") for n in instance.nodes):
            yield f"site {provenance.key!r} at {provenance.at!r} reads nothing of its adapter {provenance.path!r}"


@dialect_rule
def shared_nodes_are_read_by_sites(graph_module: fx.GraphModule) -> Iterator[str]:
    """What several sites share is read by nothing but adapters, a product of theirs by slices alone."""
    for node in graph_module.graph.nodes:
        provenance = provenance_of(node)
        if provenance is None or provenance.role != "shared":
            continue
        for user in node.users:
            if provenance_of(user) is None:
                yield f"node {node.name!r} is shared by sites, and {user.name!r} reads it, which is none of theirs"
            elif node.target is aten.linear.default and user.target is not aten.slice.Tensor:
                yield f"node {node.name!r} is shared by sites, and {user.name!r} reads it and is no slice"


@dialect_rule
def provenance_is_known(graph_module: fx.GraphModule) -> Iterator[str]:
    """The metadata entry of surgery holds a :class:`Provenance` with a known role and form."""
    for node in graph_module.graph.nodes:
        entry, provenance = provenance_entry(node), provenance_of(node)
        if entry is not None and provenance is None:
            yield f"node {node.name!r} has {entry!r} for its provenance"
        elif provenance and (provenance.role not in ROLES or provenance.form not in FORMS):
            yield f"node {node.name!r} has the role {provenance.role!r} and the form {provenance.form!r}"
