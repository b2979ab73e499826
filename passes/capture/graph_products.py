"""The products of a graph that adapters can be put on: read once, and held by names, as copies of it have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from passes.analysis.linear_sites import Skipped, products_by_site
from passes.analysis.matmul_rules import Product, casts_its_weight
from passes.capture.capture import normalised
from passes.ir.module_utils import attribute
from passes.ir.parameter_names import ParameterNames


@dataclass(frozen=True)
class GraphProduct:
    """One product of a graph, by the names of its nodes and parameters.

    Attributes:
        node, input: the product, and what it multiplies.
        added: what adds the bias where the product does not, if that stands in the graph.
        weight, bias: parameters.
        dtype: of the weight when the graph was read.
        called: path of the module whose call it is, in a graph that calls modules.
        linear: path of the plain linear module in whose forward it stands, in a graph that was exported.
    """

    node: str
    input: str
    added: str | None
    weight: str
    bias: str | None
    dtype: torch.dtype
    called: str | None
    linear: str | None


Products = Mapping[str, tuple[GraphProduct, ...]]
"""Products by the key of their site."""


@dataclass(frozen=True)
class GraphProducts:
    """All products of a graph.

    Attributes:
        rewritable: those that a term can be added to.
        whole: keys of sites whose weight is changed as a whole.
        refused: those that cannot be rewritten, with the reason.
    """

    rewritable: Products
    whole: frozenset[str]
    refused: tuple[Skipped, ...]


def graph_products(model: fx.GraphModule, graph: fx.Graph, read: fx.GraphModule | None = None) -> GraphProducts:
    """Read the products of a graph.

    Args:
        graph: a graph whose attributes are the model's; the names of the products' nodes are those of this graph.
        read: the graph normalised, where it has been.
    """
    read = normalised(model, graph) if read is None else read
    names = ParameterNames(model, read.graph)
    products, _ = products_by_site(read, names)
    weights = names.tensors
    nodes = {node.name: node for node in graph.nodes}
    refused: list[Skipped] = []
    whole: set[str] = set()
    rewritable: dict[str, tuple[GraphProduct, ...]] = {}
    for key, of_site in products.items():
        reasons = (
            _elsewhere(nodes.get(p.node.name))
            if p.matrices
            else _why_not(model, p, nodes.get(p.node.name), weights[p.weight].dtype)
            for p in of_site
        )
        reason = next(filter(None, reasons), None)
        if not reason and any(p.matrices for p in of_site) and len({nodes[p.node.name].op for p in of_site}) > 1:
            reason = "its weight is read by a module's call, and without one"
        if reason:
            refused.append(Skipped(key, "linear", reason))
        elif any(p.matrices for p in of_site):
            whole.add(key)
        else:
            rewritable[key] = tuple(_by_names(p, nodes, weights[p.weight].dtype) for p in of_site)
    return GraphProducts(rewritable, frozenset(whole), tuple(refused))


def are_current(model: fx.GraphModule, products: Products) -> bool:
    """Whether what was read of a graph still holds: since then, a module may have got hooks, a weight another dtype."""
    for product in (product for of_site in products.values() for product in of_site):
        weight = attribute(model, product.weight)
        if isinstance(weight, torch.Tensor) and weight.dtype != product.dtype:
            return False
        module = attribute(model, product.called) if product.called is not None else None
        if isinstance(module, nn.Module) and _is_hooked(module):
            return False
    return True


def _by_names(product: Product, nodes: Mapping[str, fx.Node], dtype: torch.dtype) -> GraphProduct:
    added = product.added.name if product.added is not None and product.added.name in nodes else None
    called, linear = product.node.meta.get("called_module"), None
    if called is None:
        stack = product.node.meta.get("nn_module_stack") or {"": ("", "")}
        names = [k if isinstance(k, str) else f"{k.__module__}.{k.__qualname__}" for _, k in reversed(stack.values())]
        # PyTorch's own composite modules may read the weight without the call (TransformerEncoderLayer in eval mode)
        composite = len(names) > 1 and names[1].startswith("torch.nn.") and ".container." not in names[1]
        if names[0].rpartition(".")[2] in ("Linear", "Conv1D") and not composite:
            linear = str(next(reversed(stack.values()))[0])
    return GraphProduct(
        product.node.name, product.input.name, added, product.weight, product.bias, dtype, called, linear
    )


def _elsewhere(node: fx.Node | None) -> str | None:
    if node is None:
        return "it stands in a region of its own (autocast or no_grad), which is not rewritten"
    return None


def _why_not(model: fx.GraphModule, product: Product, node: fx.Node | None, dtype: torch.dtype) -> str | None:
    """Why a product with a weight of some dtype cannot be rewritten in a graph, or None."""
    if node is None:
        return _elsewhere(node)
    if casts_its_weight(product, dtype):
        return "its weight is cast before the product"
    if node.op == "call_module" and _is_hooked(model.get_submodule(str(node.target))):
        return "its module carries forward hooks, which a rewritten graph would pass by"
    return None


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
