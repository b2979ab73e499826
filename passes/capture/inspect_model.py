"""Everything that is known about a model before it is operated on: its capture, its sites, what is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from passes.analysis.linear_sites import Site, Skipped, sites_from_graph, sites_from_walk
from passes.capture.capture import capture, default_inputs, forward_call
from passes.capture.graph_products import Products, graph_products
from passes.capture.module_calls import CallRecord, record_calls
from passes.capture.without_graph import sites_without_graph
from passes.ir.parameter_names import tensor_name


@dataclass(frozen=True)
class Inspection:
    """The sites of a model and where they come from.

    Attributes:
        sites: in order of execution (of registration where the model was not captured).
        skipped: matrix products that are no sites, with the reason.
        how: the way of capture; "module walk" means not captured.
        notes: why it was not captured, what could not be recorded.
        calls: what a recorded forward showed; None without example inputs.
        products: of a graph, those that an adapter can be written beside.
    """

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    how: str
    notes: tuple[str, ...] = ()
    calls: CallRecord | None = None
    products: Products = field(default_factory=dict)

    @property
    def captured(self) -> bool:
        """Whether there is a graph."""
        return self.how != "module walk"


def inspect_model(
    model: nn.Module,
    example_inputs: object = None,
    by_evidence: Callable[[nn.Module], bool] = lambda module: False,
) -> Inspection:
    """Capture a model and find its sites; the model is left as it was.

    Args:
        model: any ``nn.Module``.
        example_inputs: dict, tuple or tensor; ``transformers`` models have defaults.
        by_evidence: whether a subclass of ``nn.Linear`` with a forward of its own computes ``x W^T + b``, although the
            matrix is none that a graph shows to be a parameter: it is computed from one, as of a quantised weight.

    Raises:
        InputError: the model does not run on the example inputs.
    """
    given = example_inputs is not None
    example_inputs = example_inputs if given else default_inputs(model)
    calls, notes = None, []
    if example_inputs is not None:
        try:
            calls = record_calls(model, forward_call(example_inputs))
            notes += [calls.note] if calls.note else []
        except Exception as error:
            if given:
                raise
            notes.append(f"default inputs do not fit: {error}")
            example_inputs = None
    recorded, built = calls is not None, calls.built if calls else {}
    products: Products = {}
    captured = capture(model, example_inputs)
    if captured.note:
        notes.append(f"not captured: {captured.note}")
    if captured.graph is None:
        call = forward_call(example_inputs) if recorded else None
        sites, skipped = sites_without_graph(model, call)
    else:
        sites, skipped = sites_from_graph(captured.graph, model)
        refused: tuple[Skipped, ...] = ()
        if isinstance(model, fx.GraphModule):
            found_in_graph = graph_products(model, model.graph, captured.graph)
            products, refused = found_in_graph.rewritable, found_in_graph.refused
            skipped = [*skipped, *refused]
            sites = [site for site in sites if site.key in products or site.key in found_in_graph.whole]
        hidden = _reached(model, calls) if calls else _inside_leaf_modules(model, captured.graph)
        calls = calls or _calls_of(captured.graph)
        known = {site.weight for site in sites}
        sites += [site for site in hidden if site.weight not in known]
        hosted = {site.key for site in sites}
        skipped = [skip for skip in skipped if skip not in refused or skip.where not in hosted]
    known = {site.key for site in sites}
    found = {site.key: site for site in _by_evidence(model, skipped, by_evidence) if site.key not in known}
    order = {path: i for i, (path, _) in enumerate(model.named_modules())} if found else {}
    for site in found.values():  # where they stand in the order of registration: the graph names no node of theirs
        later = (i for i, other in enumerate(sites) if order.get(other.weight.rpartition(".")[0], 0) > order[site.key])
        sites.insert(next(later, len(sites)), site)
    if found and calls is not None and not recorded:  # the trace went through their calls
        calls = CallRecord(calls.called | found.keys(), calls.read - {site.weight for site in found.values()})
    operated = {site.weight for site in sites} if not isinstance(model, fx.GraphModule) else set()
    skipped = [
        skip for skip in skipped if skip.where not in found and not (skip.weights and operated.issuperset(skip.weights))
    ]
    sites, skipped = [s for s in sites if s.weight not in built], [*skipped, *_built(sites, skipped, built)]
    return Inspection(tuple(sites), tuple(skipped), captured.how, tuple(notes), calls, products)


def _built(sites: list[Site], skipped: list[Skipped], built: Mapping[str, str]) -> Iterator[Skipped]:
    """The sites, and the weights of linear modules, that are not there before the first forward."""
    operations = {site.weight: site.operation or "linear" for site in sites if site.weight in built}
    linear = [name for name, owner in built.items() if name.endswith("weight") and "Linear" in owner]
    known = {skip.where for skip in skipped}
    for name in dict.fromkeys([*operations, *linear]):
        where = name.rpartition(".")[0] or name
        if where not in known:
            reason = "it is built, or replaced, in the first forward: run the model once before surgery"
            yield Skipped(where, operations.get(name, "linear"), reason)


def _by_evidence(model: nn.Module, skipped: list[Skipped], accepts: Callable[[nn.Module], bool]) -> Iterator[Site]:
    """The skipped products that stand in a linear module, where that is accepted; roles in the model are unknown."""
    modules = dict(model.named_modules()) if skipped else {}
    for skip in skipped:
        module = modules.get(skip.where)
        if isinstance(module, nn.Linear) and accepts(module):
            weight, bias = (f"{skip.where}.{name}".lstrip(".") for name in ("weight", "bias"))
            sizes = (module.out_features, module.in_features)
            yield Site(skip.where, weight, None if module.bias is None else bias, "out_in", *sizes)


def _reached(model: nn.Module, calls: CallRecord) -> list[Site]:
    """Sites that ran but that the graph shows in pieces or not at all, such as a packed weight that is cut in three."""
    walked, _ = sites_from_walk(model)
    return [s for s in walked if s.weight.rpartition(".")[0] in calls.called or s.weight in calls.read]


def _inside_leaf_modules(model: nn.Module, graph_module: fx.GraphModule) -> list[Site]:
    """Sites inside the modules that a symbolic trace does not look into."""
    leaves = tuple(f"{node.target}." for node in graph_module.graph.nodes if node.op == "call_module")
    return [site for site in sites_from_walk(model)[0] if site.weight.startswith(leaves)]


def _calls_of(graph_module: fx.GraphModule) -> CallRecord:
    """What a symbolic trace says of calls: modules it calls, and parameters it reads by name."""
    called: set[str] = set()
    read: set[str] = set()
    for node in graph_module.graph.nodes:
        path = node.meta.get("called_module")
        if path is not None:
            called.add(path)
            read -= {f"{path}.weight", f"{path}.bias"}
        elif (name := tensor_name(node)) is not None and not all("called_module" in user.meta for user in node.users):
            read.add(name)
    return CallRecord(frozenset(called), frozenset(read))
