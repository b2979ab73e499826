"""The base of an operated model as a graph, and its sites rebuilt for that graph."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Collection, Mapping

import torch
from torch import fx, nn

from passes.analysis.linear_sites import Site
from passes.capture.capture import (
    default_inputs,
    export_program,
    forward_call,
    hub_inputs,
    is_pretrained,
    with_two_rows,
)
from passes.capture.graph_products import Products
from passes.errors import CaptureError, InputError, PassError, SurgeryError
from passes.infra.tolerance import RELATIVE, disagreement
from passes.infra.translation_validation import Validation
from passes.ir.forward_context import Call, ExampleInputs, copied, inference_mode_of, state_kept
from passes.ir.module_utils import attribute, copy_graph
from passes.ir.torch_internals import sizes_of_one_are_free, tree_leaves, tree_map_only
from passes.transforms.insert import Insert
from passes.transforms.split_packed_weight import split_reads
from surgery.hosting.attach import graph_adapter
from surgery.hosting.graph_site import GraphSite
from surgery.hosting.graph_surgery import drop_sites, graph_sites, original_graph
from surgery.hosting.model_kinds import private_parameters
from surgery.hosting.root import unmake_root
from surgery.hosting.state import adapters_of, parameter_names, require_bases, shared_tensors
from surgery.modules.adapter import Adapter
from surgery.modules.core import Core, Factors

logger = logging.getLogger(__name__)


def capture_base(model: nn.Module, example_inputs: ExampleInputs | None = None) -> tuple[fx.GraphModule, Call]:
    """Capture what a model is without its adapters, with free sizes, as a graph module with parameters of its own.

    Returns:
        The graph module, whose parameters share the model's memory, and the call that it was captured with.

    Raises:
        InputError: there are no example inputs.
        CaptureError: the model cannot be captured.
    """
    require_bases(adapters_of(model))
    copied = copy.deepcopy(model, shared_tensors(model.modules()))
    example_inputs = default_inputs(model) if example_inputs is None else example_inputs
    if isinstance(copied, fx.GraphModule):
        if hosted := [key for key, site in adapters_of(copied).items() if not site.host.inlined]:
            raise CaptureError(
                f"site {hosted[0]!r} is hosted by a module that the graph calls, and so cannot be written into it; "
                "capture the model with torch.export, which shows what the module computes"
            )
        drop_sites(copied, graph_sites(copied))
        copied.graph = copy_graph(original_graph(copied))
        unmake_root(copied)
        return private_parameters(copied), forward_call(() if example_inputs is None else example_inputs)
    if example_inputs is None:
        raise InputError(f"capturing {type(model).__name__} needs example_inputs: a dict, a tuple or a tensor")
    for site in adapters_of(copied).values():
        site.host.detach()
    unmake_root(copied)
    # one tensor given twice would be one input of the graph
    call = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), forward_call(example_inputs))
    call = ((), hub_inputs(copied, call)) if is_pretrained(copied) else call
    try:
        module, call = _export(copied, call)
    except SurgeryError:
        raise
    except Exception as error:  # a model may resist in any way
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise CaptureError(f"{type(model).__name__} cannot be captured: {type(error).__name__}: {reason}") from error
    assert isinstance(module, fx.GraphModule)
    _share_modules(module, model)
    return private_parameters(module), call


def _export(model: nn.Module, call: Call) -> tuple[nn.Module, Call]:
    """Export with free sizes; a size of 1 in the example stays free where the model does not treat it apart."""
    doubled = with_two_rows(model, call)
    tensors = [leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    if any(1 in tensor.shape for tensor in tensors):
        try:
            with sizes_of_one_are_free():
                module = export_program(model, call, dynamic=True).module()
            for args, kwargs in (copied(call), copied(doubled)):  # its guards may still fix a size
                with state_kept(model):  # whose buffers the program has
                    module(*args, **kwargs)
            return module, call
        except Exception as error:  # some models treat a size of 1 apart
            logger.info("a size of 1 in the example inputs is taken to be fixed: %s", error)
    return export_program(model, doubled, dynamic=True).module(), doubled


def _share_modules(graph: fx.GraphModule, model: nn.Module) -> None:
    """Let a module with several paths be one module in the graph too, where ``torch.export`` makes one of each path."""
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kept = first.setdefault(id(module), path)
        if kept == path or attribute(graph, path) is None:
            continue
        other = graph.get_submodule(path)
        if attribute(graph, kept) is None:
            first[id(module)] = path
            continue
        one = graph.get_submodule(kept)
        if one is not other:
            for name, parameter in other._parameters.items():
                one._parameters.setdefault(name, parameter)
            for name, buffer in other._buffers.items():
                one._buffers.setdefault(name, buffer)
            parent, _, local = path.rpartition(".")
            graph.get_submodule(parent)._modules[local] = one


def sites_for(
    graph: fx.GraphModule, products: Products, paths: Mapping[nn.Module, str], hosted: Mapping[str, Adapter]
) -> list[Adapter]:
    """The sites of a model rebuilt for a graph: same factors, same core parameters, a coeff of their own.

    Args:
        products: of the graph, those that an adapter can be written beside.
        paths: of the model's modules.
        hosted: the model's adapters.
    """
    reads = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    found, missing = [], []
    for key, site in hosted.items():
        weight, bias = parameter_names(paths, site)
        if key in products:  # of tied names, a capture may keep another, and so may a product read another
            weight = products[key][0].weight
        if key not in products and weight not in reads:
            missing.append(key)
            continue
        core = Core({}, site.core.dtype, site.device)
        core._parameters.update(site.core._parameters)
        core._buffers.update(site.core._buffers)
        factors = Factors(site.factors.U, site.factors.S, site.factors.Vh)
        host = GraphSite(graph, weight, bias, changes_weight=key not in products, in_place=site.host.in_place)
        d_in, d_out = site.features
        place = Site(key, weight, bias, site.layout, d_out, d_in, stack=factors.stack, rows=site.rows)
        node = graph_adapter(host, place, site.variant, factors, core)
        node.record = site.record.for_copy()
        if (weight_in_graph := host.registered()) is not None:
            node.record.adopt(node, weight_in_graph)  # it shares its memory with the one that was compared
        found.append(node.train(graph.training))
    if missing:
        warnings.warn(
            f"{len(missing)} sites do not run on the example inputs and are not in the graph: {', '.join(missing[:5])}",
            stacklevel=4,
        )
    return found


def split_packed(graph: fx.GraphModule, paths: Mapping[nn.Module, str], hosted: Mapping[str, Adapter]) -> None:
    """Split the reads of packed weights into the parts that are sites."""
    found: dict[str, list[Adapter]] = {}
    for site in hosted.values():
        if site.rows:
            found.setdefault(parameter_names(paths, site)[0], []).append(site)
    for weight, parts in found.items():
        split_reads(graph.graph, weight, len(parts[0].host.parameter()), [part.rows for part in parts])  # type: ignore[misc]
    if found:
        graph.recompile()


def check_capture(
    model: nn.Module, graph: fx.GraphModule, insert: Insert, tensors: Collection[str], validation: Validation
) -> None:
    """Compare what the model gives with the captured base whose products are changed by the model's own adapters.

    Args:
        insert: the pass that is to put the adapters in.
        tensors: names of all tensors of the adapters, which keep their values.

    Raises:
        PassError: they differ, so that the capture, or the choice of products, is wrong.
    """
    vals = [node.meta.get("val") for node in graph.graph.nodes]  # also of regions that compute in another dtype
    tensors_of_all = [*model.parameters(), *model.buffers(), *tree_leaves(validation.calls), *vals]
    dtypes = {t.dtype for t in tensors_of_all if isinstance(t, torch.Tensor) and t.dtype in RELATIVE}
    coarsest = max(dtypes, key=RELATIVE.__getitem__, default=None)  # an output may have been computed in another dtype
    places, references = insert.comparison_points(graph), insert.references(graph)
    found = validation.observe(graph, places, references=references, frozen=tensors)
    for (args, kwargs), values in zip(validation.calls, found, strict=True):
        with state_kept(model), inference_mode_of(model), torch.no_grad():
            torch.manual_seed(validation.seed)
            expected = model(*copied((args, kwargs))[0], **copied((args, kwargs))[1])
        output = values[""]
        if isinstance(output, Mapping) and isinstance(expected, Mapping):  # a model may give a cache, a graph does not
            pairs = [(output[name], expected[name]) for name in output if name in expected]
        else:
            pairs = [(output, expected)]
        for one, other in pairs:
            for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
                problem = disagreement(a, b, coarsest) if isinstance(b, torch.Tensor) else None
                if problem:
                    raise PassError(f"the captured graph does not compute what the model does: {problem}")
