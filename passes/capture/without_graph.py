"""The sites of a model that no capture takes: its linear modules, and the products of one run with other parameters.

Every parameter of two or more dimensions that a product may read is a site, or is named with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import fx, nn

from passes.analysis.linear_sites import Site, Skipped, sites_from_graph, sites_from_walk
from passes.capture.run_trace import trace_run
from passes.ir.forward_context import Call
from passes.ir.parameter_names import ParameterNames, tensor_name

LOOK_UPS = (nn.Embedding, nn.EmbeddingBag)  # which multiply nothing
NOT_RUN = "it is not read on the example inputs"
NOT_KNOWN = "how it is read is not known: the model was not captured, and example_inputs were not given"


def sites_without_graph(model: nn.Module, call: Call | None) -> tuple[list[Site], list[Skipped]]:
    """Find the sites of a model without a graph; order, groups and roles stay unknown.

    Args:
        call: inputs that the model runs on, or None.

    Returns:
        The sites, linear modules first, and what is no site.
    """
    sites, skipped = sites_from_walk(model)
    trace = trace_run(model, call) if call is not None else None
    if trace is not None:
        known = {site.weight for site in sites}
        of_run, left = sites_from_graph(trace, model)
        sites += [replace(site, group=None, residual=None, calls=1) for site in of_run if site.weight not in known]
        seen = {weight for skip in left for weight in skip.weights}
        skipped = [skip for skip in skipped if not seen.issuperset(skip.weights) or not skip.weights]
        skipped += [skip for skip in left if skip.weights]
    return sites, [*skipped, *_others(model, sites, skipped, trace)]


def _others(
    model: nn.Module, sites: list[Site], skipped: list[Skipped], trace: fx.GraphModule | None
) -> Iterator[Skipped]:
    """The parameters of two or more dimensions that are neither sites nor named, and may be read in a product."""
    names = ParameterNames(model)
    read = {tensor_name(node) for node in trace.graph.nodes} if trace is not None else set()
    told = {site.weight for site in sites} | {weight for skip in skipped for weight in skip.weights} | read
    known = {id(names.tensors[name]) for name in told if name in names.tensors}
    for name, parameter in model.named_parameters():
        owner = names.modules[name.rpartition(".")[0]]
        if id(parameter) in known or isinstance(owner, LOOK_UPS) or nn.parameter.is_lazy(parameter):
            continue
        if parameter.dim() > 1:
            yield Skipped(names.key(name), "parameter", NOT_KNOWN if trace is None else NOT_RUN, (name,))
