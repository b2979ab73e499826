"""From a model that is operated on in place to a graph that holds its adapters, and through the passes.

capture  the base as one FX graph, its sizes free      (the adapters are taken off a copy that shares every tensor)
insert   each site's adapter, inlined                  delta or residual form
fold     the frozen factors                            residual -> delta, constants, S into its neighbour
fuse     down-projections that read the same input     on request: one product for q, k and v, one for gate and up
merge    dense weights                                 plain products again
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn

from passes.errors import InputError
from passes.infra.pass_base import Pass, PassResult
from passes.infra.pass_manager import run_pipeline
from passes.infra.translation_validation import Validation
from passes.ir.adapter_trace import adapter_tensors
from passes.ir.forward_context import copied, outside_inference_mode
from passes.ir.module_utils import copy_graph
from passes.ir.provenance import adapter_instances
from passes.transforms.fold import Fold
from passes.transforms.fuse_projections import Fuse, shared_factor_names
from passes.transforms.insert import Insert
from passes.transforms.merge_adapters import Merge
from passes.transforms.propagate_metadata import Annotate
from surgery.hosting.beside_cores import beside_cores
from surgery.hosting.checks import check_flags, check_form
from surgery.hosting.graph_surgery import drop_sites, graph_sites, graph_state, products_of, register_sites, rewrite
from surgery.hosting.root import make_root, share_steering, unmake_root
from surgery.hosting.state import (
    State,
    adapters_in,
    adapters_of,
    check_weights,
    module_paths,
    record_of,
    restore_flags,
    unwrap,
)
from surgery.hosting.transaction import transaction
from surgery.verbs.argument_types import ExampleInputs, Form, Stage, Verify
from surgery.verbs.capture_base import capture_base, check_capture, sites_for, split_packed
from surgery.verbs.verification import call_to_verify, graph_validation


@dataclass(frozen=True)
class Compiled:
    """A graph, and what each stage did to it.

    Attributes:
        graph: operated on like any other; a plain one after the stage "merge".
        stages: name, whether it changed anything, number of nodes, seconds, and error where it was verified.
    """

    graph: fx.GraphModule
    stages: tuple[PassResult, ...]


def to_graph(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    form: Form = "delta",
    keep_base: bool = True,
    fuse: bool = False,
    verify: Verify = False,
    debug: bool | None = None,
) -> fx.GraphModule:
    """Capture an operated model as one graph with its adapters inlined; the model is left as it was.

    The graph's parameters share the memory of the model's, its cores are the model's own (training one trains the
    other), and its ``coeff`` is its own. Batch, sequence and other sizes stay free where the model leaves them free.
    All verbs work on it: ``sites``, ``set_coeff``, ``save_adapter``, ``merge``, ``undo_surgery``. The graph of a
    ``transformers`` model takes its inputs by keyword.

    Args:
        model: operated on by ``apply_surgery`` or ``load_adapter``.
        example_inputs: dict, tuple or tensor; ``transformers`` models have defaults.
        form: "delta", or "residual", in which each product is that of the remainder ``W_res`` and the adapter holds
            ``S h + delta``.
        keep_base: in residual form, keep the base weights in the graph module, for ``undo_surgery``, and for ``fold``
            to put back bit for bit; else it gives them rounded once (each site's ``base_error`` says how far off).
        fuse: let sites that read the same input share one down-projection, as :func:`fuse` does; delta form only.
        verify: compare the graph with the model's own adapters, and before and after each pass, on these inputs and on
            random ones of their shapes; True takes those that the graph is captured with.
        debug: check the specification of the graph dialect after the pass.

    Raises:
        SurgeryError: the model carries no surgery.
        InputError: the form is unknown, or the options do not go together.
        CaptureError: it cannot be captured.
        PassError: the insertion failed, or verification found a difference.
    """
    compiled = pipeline(
        model, example_inputs, form=form, keep_base=keep_base, fuse=fuse, stop_after="fuse" if fuse else "insert",
        disable=["fold"] if fuse else [], verify=verify, debug=debug,
    )  # fmt: skip
    return compiled.graph


@outside_inference_mode
def pipeline(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    form: Form = "delta",
    keep_base: bool = True,
    fuse: bool = False,
    stop_after: Stage | None = None,
    disable: Collection[Stage] = (),
    only: Collection[str] | None = None,
    untie: bool = False,
    verify: Verify = False,
    debug: bool | None = None,
) -> Compiled:
    """Run the whole compiler on an operated model: capture, insert, fold, fuse, merge; the model is left as it was.

    Args:
        form, keep_base, verify, debug: as in :func:`to_graph`.
        fuse: fuse down-projections between "fold" and "merge".
        stop_after: name of the last stage to run ("insert", "fold", "fuse", "merge").
        disable: stages to leave out.
        only: keys of the sites to keep; the others are left as the base has them.
        untie: give a site whose weight has other readers a weight of its own when it is merged.

    Raises:
        SurgeryError: as :func:`to_graph`; VariantError or WeightError where a site cannot be merged.
    """
    model = unwrap(model)
    check_form(form)
    check_flags(keep_base=keep_base, fuse=fuse, untie=untie)
    verified = call_to_verify(model, verify, ((), {}))  # what is wrong is refused before anything is captured
    if not keep_base and form != "residual":
        raise InputError("keep_base=False needs form='residual'; in delta form the base weight is part of the graph")
    if fuse and form == "residual" and (Fold.name in disable or stop_after == Insert.name):
        raise InputError("fuse=True needs form='delta', or the stage 'fold', which makes it of form='residual'")
    record = record_of(model)
    paths = module_paths(model)
    found = adapters_in(paths)
    check_weights(found)
    with transaction(model):  # whose cores the graph shares
        graph, call = capture_base(model, example_inputs)
        hosted = {key: site for key, site in found.items() if only is None or key in only}
        split_packed(graph, paths, hosted)
        products = products_of(model if isinstance(model, fx.GraphModule) else graph)
        before = graph_state(graph, products)
        state = State(dict(record.requires_grad), record.inspection, dict(record.factorisation), before)
        state.captured_call = copied(call)
        make_root(graph, state)
        state.steering.to(record.steering.coeff.device, record.steering.coeff.dtype)
        state.steering.write(record.steering.coeff)
        state.number, state.coefficient = record.number, record.coefficient
        state.brought_in_place = set(beside_cores(model))  # the graph has parameters of its own on the same memory
        sites = sites_for(graph, products, paths, hosted)
        for site in sites if form == "residual" else ():
            if not site.host.changes_weight:
                site.host.split()
        for site in () if keep_base else sites:
            site.host.base_fingerprint = site.base_weight.fingerprint()
        share_steering(graph, state, sites)
        places = register_sites(graph, graph.graph, products, sites)
        graph.graph = copy_graph(graph.graph)
        merging = Merge.name not in disable and stop_after in (None, Merge.name)
        insert = Insert(places, keep_base=keep_base)
        stages: list[Pass] = [
            insert,
            Fold(_tensors(graph, "factors.")),
            *([Fuse()] if fuse else []),
            Merge({site.key: site.merged_weight() for site in sites} if merging else {}, untie=untie),
        ]
        validation = None if verified is None else Validation(call if verify is True else verified)
        if validation is not None and only is None:
            check_capture(model, graph, insert, _tensors(graph, "", coeff=True), validation)
        results = run_pipeline(
            graph, stages, stop_after=stop_after, disable=disable, validation=validation, debug=debug
        )
        results.append(Annotate().run(graph))
        _drop_finished_sites(graph)
    return Compiled(graph, tuple(results))


@outside_inference_mode
def fold(
    model: fx.GraphModule,
    *,
    freeze_core: bool = False,
    freeze_coeff: bool | None = None,
    untie: bool = False,
    verify: Verify = False,
    debug: bool | None = None,
) -> fx.GraphModule:
    """Fold the frozen tensors of an operated graph, in place: residual form to delta form, constants, S into ``Vh``.

    Args:
        freeze_core: treat the cores as constants too; they can no longer be trained.
        freeze_coeff: treat coeff as a constant; as ``freeze_core`` by default. With both, the graph has the base's
            nodes and no others, with the dense weights that :func:`surgery.merge` gives.
        untie: give a site whose weight has other readers a weight of its own.
        verify: compare the graph before and after on these inputs; True takes those that it was captured with.
        debug: check the specification of the graph dialect afterwards.

    Raises:
        InputError: the model is no operated graph, or coeff steers rows and cannot be a constant.
        VariantError: an adapter that is all constant is not linear, so that no weight has its effect.
        PassError: the fold failed or verification found a difference; the graph is what it was.
    """
    if not isinstance(model, fx.GraphModule):
        raise InputError(f"fold works on graphs, and {type(model).__name__} is none: use to_graph first")
    record_of(model)
    freeze_coeff = freeze_core if freeze_coeff is None else freeze_coeff
    nodes = graph_sites(model)
    if freeze_coeff:
        for key, site in nodes.items():
            if site.steering.coeff.numel() > 1:
                raise InputError(f"site {key!r}: coeff steers the rows of a batch: set a scalar coeff first")
    bases = [(site.weight_name, site.weight) for site in nodes.values() if site.host.keeps_base]
    frozen = _tensors(model, "factors.", *(["core."] if freeze_core else []), coeff=freeze_coeff)
    validation = graph_validation(model, verify)
    with transaction(model):
        for site in nodes.values() if freeze_core else ():  # copies, since the model in place may train the cores on
            for name, parameter in site.core.named_parameters():
                site.core._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        rewrite(
            model,
            [Fold(frozen, untie=untie), Annotate()],
            validation=validation,
            debug=debug,
        )
        for site in nodes.values():
            site.coeff_is_folded |= freeze_coeff
        _drop_finished_sites(model, bases)
    return model


@outside_inference_mode
def fuse(model: fx.GraphModule, *, verify: Verify = False, debug: bool | None = None) -> fx.GraphModule:
    """Let sites of an operated graph that read the same input share one down-projection, in place.

    The factors ``Vh`` of such sites (q, k and v; gate and up) become views of one tensor, and each adapter goes on from
    its slice of one product; what is in residual form is left alone. All verbs work as before.

    Args:
        verify: compare the graph before and after on these inputs; True takes those that it was captured with.
        debug: check the specification of the graph dialect afterwards.

    Raises:
        InputError: the model is no operated graph.
        PassError: verification found a difference; the graph is what it was.
    """
    if not isinstance(model, fx.GraphModule):
        raise InputError(f"fuse works on graphs, and {type(model).__name__} is none: use to_graph first")
    record_of(model)
    rewrite(model, [Fuse(), Annotate()], validation=graph_validation(model, verify), debug=debug)
    return model


def _tensors(graph: fx.GraphModule, *prefixes: str, coeff: bool = False) -> set[str]:
    """Full names of the tensors of all sites in a graph that start with one of the prefixes."""
    paths = {id(module): path for path, module in graph.named_modules()}
    names = set()
    for site in graph_sites(graph).values():
        for name in adapter_tensors(site):
            chosen = name.startswith((*prefixes, "W_res", "folded_")) and name != site.coefficient_name
            chosen |= name.removeprefix("core.") in site.variant.frozen
            if chosen or (coeff and name == site.coefficient_name):
                names.add(f"{paths[id(site)]}.{name}")
    return names | shared_factor_names(graph)


def _drop_finished_sites(graph: fx.GraphModule, bases: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
    """Drop the sites that a graph no longer holds, and the remainders that no product reads.

    Args:
        bases: weights that the graph had, by name, whose flags are put back with the last site.
    """
    nodes = graph_sites(graph)
    standing = {instance.provenance.key for instance in adapter_instances(graph.graph)}
    original = record_of(graph).original
    for site in nodes.values():
        if site.form == "delta":
            site._buffers.pop("W_res", None)
        if not site.host.keeps_base and original is not None:
            original.parameters.pop(site.weight_name, None)
    if gone := set(nodes) - standing:
        drop_sites(graph, gone)
    if not adapters_of(graph):
        restore_flags(graph, record_of(graph).requires_grad, bases)
        unmake_root(graph)
