"""Merge: take adapters out of the graph and put dense weights in; the products are plain ones again."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from passes.analysis.residual_stream import VIEWS, operation
from passes.infra.pass_base import Pass
from passes.ir.adapter_trace import InlinableAdapter, adapter_at
from passes.ir.erased_nodes import erase_unread, erased_nodes_of, restore_product
from passes.ir.module_utils import attribute, map_inputs, set_parameter, tensor_at
from passes.ir.parameter_names import tensor_name
from passes.ir.provenance import AdapterInstance, adapter_instances, clear_provenance, provenance_of, sites_by_product
from passes.transforms.split_packed_weight import is_part

VIEWS_OF_A_WEIGHT = VIEWS | {"t", "transpose", "permute", "numpy_t", "mt", "getattr", "detach", "expand"}


class Merge(Pass):
    """Replace adapters by weights.

    Args:
        weights: the dense weight of each site to merge, by key, in the layout and dtype of its base weight.
        untie: give a site whose weight has other readers a weight of its own.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], *, untie: bool = False) -> None:
        self.weights = weights
        self.untie = untie

    def requires(self, graph_module: fx.GraphModule) -> str | None:
        """Every site stands in the graph, its weight has the right shape, and no other reader unless untied."""
        by_key, readers = _by_key(graph_module, self.weights), readers_of_parameters(graph_module)
        for key, weight in self.weights.items():
            if key not in by_key:
                return f"site {key!r} is not in the graph"
            adapter = adapter_at(graph_module, by_key[key][0].provenance.path)
            if weight.shape != adapter.weight.shape or weight.dtype != adapter.weight.dtype:
                return (
                    f"site {key!r}: expected a weight of shape {tuple(adapter.weight.shape)} and "
                    f"{adapter.weight.dtype}, found {tuple(weight.shape)} and {weight.dtype}"
                )
            others = _others(by_key[key], readers[identity(graph_module, adapter)])
            if others and not self.untie:
                return (
                    f"site {key!r} shares its weight with node {', '.join(repr(node.name) for node in others)}, which "
                    "merging would change too; untie to give the site a weight of its own"
                )
        return None

    def comparison_points(self, graph_module: fx.GraphModule) -> dict[str, str]:
        """What translation validation compares: each product, as it was named before surgery."""
        return sites_by_product(graph_module.graph, self.weights)

    def constants(self, graph_module: fx.GraphModule) -> frozenset[str]:
        """The tensors of the merged adapters, whose values are in the weights."""
        paths = tuple(
            f"{instance.provenance.path}." for instance in adapter_instances(graph_module.graph, self.weights)
        )
        tensors = [*graph_module.named_parameters(), *graph_module.named_buffers()]
        return frozenset(name for name, _ in tensors if name.startswith(paths))

    def call(self, graph_module: fx.GraphModule) -> bool:
        """Put the plain products back, and then the weights."""
        by_key, readers = _by_key(graph_module, self.weights), readers_of_parameters(graph_module)
        names = {node.name: node for node in graph_module.graph.nodes}
        shared = dict(graph_module._modules)
        for key, instances in by_key.items():
            adapter = adapter_at(graph_module, instances[0].provenance.path)
            weight, name = adapter.weight, adapter.weight_name
            merged, rows = self.weights[key], adapter.rows
            if rows is not None:
                whole = tensor_at(graph_module, name).detach()
                merged = torch.cat([whole[: rows[0]], merged, whole[rows[1] :]])
            tied = bool(_others(instances, readers[identity(graph_module, adapter)]))
            nodes = [take_out(instance, names) for instance in instances]
            # a module that is called gets a copy of its own, in which the weight has its old name
            if tied and nodes[0].op != "call_module":
                name = _free_name(graph_module, key)
                for node in nodes:
                    _read_instead(graph_module, node, adapter.weight_name, name)
            set_parameter(graph_module, name, merged, requires_grad=weight.requires_grad, shared=shared)
        return bool(self.weights)

    def ensures(self, graph_module: fx.GraphModule) -> str | None:
        """Nothing of the merged adapters is left."""
        left = adapter_instances(graph_module.graph, self.weights)
        return f"site {left[0].provenance.key!r} still carries an adapter" if left else None


def take_out(instance: AdapterInstance, names: dict[str, fx.Node]) -> fx.Node:
    """Put the plain product of an instance back, erase the adapter's nodes, and return the product's node.

    Args:
        names: all nodes of the graph by name, brought up to date here.
    """
    out, base = instance.out, instance.base
    graph, node = out.graph, base
    if instance.provenance.form == "residual":
        current: dict[str, fx.Node] = {instance.provenance.input: instance.input}
        if instance.provenance.added is not None and instance.added is not None:
            current[instance.provenance.added] = instance.added
        node = restore_product(erased_nodes_of(out), out, current, names)
    else:
        clear_provenance(node)
    out.replace_all_uses_with(node)
    sources = dict.fromkeys(source for own in instance.nodes for source in own.all_input_nodes)
    shared = [source for source in sources if (provenance := provenance_of(source)) and provenance.role == "shared"]
    for current_node in reversed(instance.nodes):
        if current_node is not node:
            graph.erase_node(current_node)
    erase_unread(graph, shared)
    return node


def readers_of_parameters(graph_module: fx.GraphModule) -> dict[int | str, list[fx.Node]]:
    """What reads each parameter, by its identity: operations behind its transposes and casts, and module calls."""
    readers: dict[int | str, list[fx.Node]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            for parameter in graph_module.get_submodule(node.target).parameters():
                readers[id(parameter)].append(node)
        name = tensor_name(node)
        value = None if name is None else attribute(graph_module, name)
        if not isinstance(value, torch.nn.Parameter):
            continue
        if (provenance := provenance_of(node)) and provenance.role == "base":
            readers[id(value)].append(node)
            continue
        pending = list(node.users)
        while pending:
            user = pending.pop()
            if provenance_of(user) is None and operation(user, node.graph) in VIEWS_OF_A_WEIGHT:
                pending.extend(user.users)
            elif user not in readers[id(value)]:
                readers[id(value)].append(user)
    for instance in adapter_instances(graph_module.graph):
        if instance.provenance.form == "residual":  # reads its weight again when it is taken out
            readers[identity(graph_module, adapter_at(graph_module, instance.provenance.path))].append(instance.base)
    return readers


def identity(graph_module: fx.GraphModule, adapter: InlinableAdapter) -> int | str:
    """What tells the weight of an adapter from others: the tensor, or its name where the graph module lacks it."""
    weight = attribute(graph_module, adapter.weight_name)
    return adapter.weight_name if weight is None else id(weight)


def other_readers(graph_module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """What reads the weight of a site beside the site itself, by the site's key."""
    readers, by_key = readers_of_parameters(graph_module), _by_key(graph_module, None)
    adapters = {key: adapter_at(graph_module, instances[0].provenance.path) for key, instances in by_key.items()}
    return {
        key: _others(instances, readers[identity(graph_module, adapters[key])]) for key, instances in by_key.items()
    }


def _others(instances: list[AdapterInstance], readers: list[fx.Node]) -> list[fx.Node]:
    own = {instance.base for instance in instances}
    split = all(is_part(base) for base in own)  # then the other parts are no other readers
    return [node for node in readers if node not in own and not (split and is_part(node))]


def _by_key(graph_module: fx.GraphModule, keys: Iterable[str] | None) -> dict[str, list[AdapterInstance]]:
    by_key: dict[str, list[AdapterInstance]] = defaultdict(list)
    for instance in adapter_instances(graph_module.graph, keys):
        by_key[instance.provenance.key].append(instance)
    return by_key


def _free_name(graph_module: fx.GraphModule, key: str) -> str:
    """A name for a weight of the site's own: that of its module's weight, unless taken."""
    name, plain = f"{key}.weight", key.replace(".", "_")
    if isinstance(attribute(graph_module, key), torch.nn.Module) and attribute(graph_module, name) is None:
        return name
    return next(n for i in itertools.count(1) if attribute(graph_module, n := f"{plain}_merged_{i}") is None)


def _read_instead(graph_module: fx.GraphModule, node: fx.Node, old: str, name: str) -> None:
    """Let a product read its weight by another name, through copies of the transposes and casts in between."""
    graph, weight = node.graph, attribute(graph_module, old)

    def renewed(source: fx.Node) -> fx.Node:
        same = source.target == old or (weight is not None and attribute(graph_module, str(source.target)) is weight)
        if source.op == "get_attr" and same:
            new = graph.create_node("get_attr", name, (), {}, f"{source.name}_merged")
            new.meta = dict(source.meta)
            return new
        if source.op not in ("call_function", "call_method") or operation(source, graph) not in VIEWS_OF_A_WEIGHT:
            return source
        inner = renewed(source.all_input_nodes[0])
        if inner is source.all_input_nodes[0]:
            return source
        return graph.node_copy(source, lambda n: inner if n is source.all_input_nodes[0] else n)

    with graph.inserting_before(node):
        node.args, node.kwargs = map_inputs(node, renewed)
