"""Operated graph modules: adapters inlined in the graph of a ``GraphModule``, their tensors in one submodule per site.

The model's graph object is never changed: surgery builds another one and puts it in its place, so that undoing it,
or failing half-way, is putting the first one back.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import fx, nn

from passes.capture.graph_products import GraphProduct, Products, are_current, graph_products
from passes.errors import SurgeryError
from passes.infra.pass_base import PassResult
from passes.infra.pass_manager import Stages, run_pipeline
from passes.infra.translation_validation import Validation
from passes.ir.module_utils import copy_graph
from passes.ir.torch_internals import put_graph
from passes.transforms.fuse_projections import StackedRows, forget_rows
from passes.transforms.insert import InsertionPoint
from passes.transforms.split_packed_weight import reads_of_part
from surgery.hosting.root import watch_calls
from surgery.hosting.state import STATE
from surgery.hosting.transaction import transaction
from surgery.modules.adapter import Adapter

CONTAINER = "sspace"


@dataclass(frozen=True)
class GraphState:
    """What a graph module was: enough to put it back, since surgery changes no graph and no shared module.

    Attributes:
        products: those of the graph that an adapter can be written beside.
    """

    graph: fx.Graph
    products: Products
    modules: dict[str, nn.Module | None]
    parameters: dict[str, nn.Parameter | None]
    sites: dict[str, nn.Module | None]
    forms: dict[str, str]
    buffers: list[tuple[nn.Module, dict[str, torch.Tensor | None], set[str]]]


def graph_state(model: nn.Module, products: Products) -> GraphState | None:
    """The state of a graph module that has these products; None for a module that is operated on in place."""
    if not isinstance(model, fx.GraphModule):
        return None
    nodes = graph_sites(model)
    holder = _container(model)
    inner = dict(holder._modules) if holder is not None else {}
    forms = {key: site.form for key, site in nodes.items()}
    rows = [module for module in model.children() if isinstance(module, StackedRows)]
    holders = [*nodes.values(), *(site.factors for site in nodes.values()), *rows]
    buffers = [(module, dict(module._buffers), set(module._non_persistent_buffers_set)) for module in holders]
    return GraphState(model.graph, products, dict(model._modules), dict(model._parameters), inner, forms, buffers)


def restore_state(model: fx.GraphModule, state: GraphState) -> None:
    """Put a graph module back."""
    model._modules.clear()
    model._modules.update(state.modules)
    model._parameters.clear()
    model._parameters.update(state.parameters)
    holder = _container(model)
    if holder is not None:
        holder._modules.clear()
        holder._modules.update(state.sites)
    for key, site in graph_sites(model).items():
        site.form = state.forms[key]
    for module, buffers, transient in state.buffers:
        module._buffers.clear()
        module._buffers.update(buffers)
        module._non_persistent_buffers_set.clear()
        module._non_persistent_buffers_set.update(transient)
    if holder is None:
        copy_as_ever(model)
    if model.graph is not state.graph:
        model.graph = state.graph


def graph_sites(model: nn.Module) -> dict[str, Adapter]:
    """The sites of a graph module that stand in its graph, by key."""
    holder = _container(model)
    return {} if holder is None else {site.key: site for site in holder.children() if isinstance(site, Adapter)}


def _container(model: nn.Module) -> nn.Module | None:
    return next((m for m in model._modules.values() if isinstance(m, _Sites)), None)


class _Sites(nn.Module):
    """Holds the sites of a graph module."""


def register_sites(
    model: fx.GraphModule, original: fx.Graph, products: Products, sites: Iterable[Adapter]
) -> list[InsertionPoint]:
    """Give a graph module the submodules of sites, and say where their adapters go.

    Args:
        original: the graph before any surgery.
        products: of that graph.
    """
    holder = _container(model)
    if holder is None:
        holder = _Sites()
        model.add_module(_free(model, CONTAINER), holder)
        copy_whole(model)
    prefix = next(name for name, module in model._modules.items() if module is holder)
    places = []
    for site in sites:
        name = _free(holder, site.key.replace(".", "_"))
        holder.add_module(name, site)
        path = f"{prefix}.{name}"
        if site.host.changes_weight:
            if site.rows is not None:
                reads = reads_of_part(original, site.weight_name, site.rows)
            else:
                reads = [n for n in original.nodes if n.op == "get_attr" and n.target == site.weight_name]
            places += [InsertionPoint(site.key, path, node.name, node.name) for node in reads]
            site.host.in_place = site.host.in_place or "weight"
            continue
        for p in products[site.key]:
            if site.host.in_place is None:
                site.host.in_place = _in_place_host(site, p)
            places.append(InsertionPoint(site.key, path, p.node, p.input, p.added, p.bias))
    return places


def _free(module: nn.Module, name: str) -> str:
    return next(n for i in itertools.count() if not hasattr(module, n := name + (f"_{i}" if i else "")))


def _in_place_host(site: Adapter, product: GraphProduct) -> Literal["module", "weight"]:
    """Whether the product was that of a linear module that is called, so that an in-place model can host it there."""
    if product.called is not None:
        return "module" if product.called == site.key else "weight"
    return "module" if product.linear is not None and f"{product.linear}.weight" == site.weight_name else "weight"


def rewrite(
    model: fx.GraphModule, stages: Stages, *, validation: Validation | None = None, debug: bool | None = None
) -> list[PassResult]:
    """Run passes on a copy of the graph, which takes the graph's place.

    Raises:
        PassError: a pass failed; the graph module is what it was.
    """
    with transaction(model):
        put_graph(model, copy_graph(model.graph))
        return run_pipeline(model, stages, validation=validation, debug=debug)


def drop_sites(model: fx.GraphModule, keys: Iterable[str]) -> None:
    """Forget sites that no longer stand in the graph, and their container with the last of them."""
    holder, gone = _container(model), set(keys)
    assert holder is not None
    for name in [name for name, site in holder.named_children() if isinstance(site, Adapter) and site.key in gone]:
        del holder._modules[name]
    forget_rows(model)
    if not holder._modules:
        for name in [name for name, module in model._modules.items() if module is holder]:
            delattr(model, name)
        copy_as_ever(model)


def original_graph(model: fx.GraphModule) -> fx.Graph:
    """The graph of a graph module before any surgery."""
    record = vars(model).get(STATE)
    return record.original.graph if record is not None else model.graph


def products_of(model: nn.Module) -> Products:
    """The products of a graph module before any surgery: read once, and then known by its state; of others none."""
    if not isinstance(model, fx.GraphModule):
        return {}
    record = vars(model).get(STATE)
    known: Products | None = record.original.products if record is not None else None
    if known is not None and are_current(model, known):
        return known
    return graph_products(model, original_graph(model)).rewritable


def copy_whole(model: fx.GraphModule) -> None:
    """Let ``copy.deepcopy`` of an operated graph module copy all of it, and not only what the graph reads; refuse what
    would leave it broken: a pickle, and a cast to a half dtype.

    PyTorch copies the tensors that the graph names into plain modules, which would lose the sites. Every graph module
    has a class of its own, so that this changes no other.
    """

    def deepcopy(self: fx.GraphModule, memo: dict[int, object]) -> fx.GraphModule:
        copied: fx.GraphModule = super(cls, self).__deepcopy__(memo)
        for table in ("_modules", "_parameters", "_buffers"):
            for name, value in vars(self)[table].items():
                vars(copied)[table][name] = copy.deepcopy(value, memo)
        if STATE in vars(self):
            vars(copied)[STATE] = copy.deepcopy(vars(self)[STATE], memo)
            vars(copied)[STATE].steering.root = weakref.ref(copied)
            watch_calls(copied)
        copy_whole(copied)
        return copied

    def refuse(self: fx.GraphModule) -> NoReturn:
        raise SurgeryError("an operated graph module cannot be pickled: use save_adapter, or state_dict")

    def apply(self: fx.GraphModule, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> fx.GraphModule:
        for key, site in graph_sites(self).items():
            dtype = fn(site.factors.S).dtype
            before, half = site.factors.S.dtype, (torch.float16, torch.bfloat16)
            if dtype != before and (dtype in half or before in half):
                raise SurgeryError(
                    f"site {key!r}: the casts in an operated graph are fixed, so it cannot go from {before} to "
                    f"{dtype}; cast the model before surgery, or the model that the graph was made from"
                )
        converted: fx.GraphModule = super(cls, self)._apply(fn, recurse)
        return converted

    cls: Any = type(model)
    cls.__deepcopy__, cls.__reduce__, cls._apply = deepcopy, refuse, apply


def copy_as_ever(model: fx.GraphModule) -> None:
    """Undo :func:`copy_whole`."""
    for name in ("__deepcopy__", "__reduce__", "_apply"):
        if name in vars(type(model)):
            delattr(type(model), name)
