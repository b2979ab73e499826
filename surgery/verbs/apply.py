"""``apply_surgery`` and ``undo_surgery``: all sites or none, and back again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, Unpack, overload

import torch
from torch import fx, nn

from passes.capture.capture import is_pretrained
from passes.capture.graph_products import Products
from passes.capture.inspect_model import Inspection
from surgery.bases import Basis
from surgery.hosting.attach import AdapterPlan, attach_all
from surgery.hosting.beside_cores import bring, put_back, say_what_stays, trained_in_place, watched_buffers
from surgery.hosting.checks import check_options
from surgery.hosting.graph_surgery import graph_state, restore_state
from surgery.hosting.model_kinds import as_module
from surgery.hosting.root import make_root, roots_of, share_steering, unmake_root
from surgery.hosting.state import State, adapters_of, record_of, require_bases, restore_flags, state_of, unwrap
from surgery.hosting.transaction import transaction
from surgery.modules.adapter import Adapter
from surgery.planning.adapter_init import plan_adapters
from surgery.planning.calibration_run import collect, first_batch
from surgery.planning.lowering_autotune import measure
from surgery.planning.surgery_plan import inspection_of, make_plan
from surgery.planning.target_selection import Patterns
from surgery.support.progress_bar import wanted_on
from surgery.support.untrusted_files import JsonObject
from surgery.variants import resolve_variant
from surgery.verbs.adopt_roots import Adopted, adopt_roots
from surgery.verbs.argument_types import (
    Calibration,
    ExampleInputs,
    Form,
    LoweringName,
    Program,
    SurgeryOptions,
    VariantLike,
)

Model = TypeVar("Model", bound=nn.Module)


def resolve_model(model: object, example_inputs: ExampleInputs | None = None) -> tuple[Any, nn.Module]:
    """What a verb gives back, and the module that it works on: the same, but behind a wrapper of ``torch.compile``.

    An ``ExportedProgram`` or a TorchScript module gives a new graph module.
    """
    inner = unwrap(model)
    module = as_module(inner, example_inputs)
    return (model if module is inner else module), module


@overload
def apply_surgery(model: Program, variant: VariantLike, **options: Unpack[SurgeryOptions]) -> fx.GraphModule: ...


@overload
def apply_surgery(model: Model, variant: VariantLike, **options: Unpack[SurgeryOptions]) -> Model: ...


def apply_surgery(
    model: nn.Module | Program,
    variant: VariantLike,
    *,
    r: int | None = None,
    target_modules: Patterns | None = None,
    exclude_modules: Patterns | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    example_inputs: ExampleInputs | None = None,
    calibration: Calibration | None = None,
    form: Form = "delta",
    lowering: LoweringName = "auto",
    keep_base: bool = True,
    basis: str | Basis | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> nn.Module:
    """Put an S-space adapter on linear operations of a model, in place; afterwards only the cores are trainable.

    Args:
        model: any ``nn.Module``; its class, its methods and every untouched tensor stay what they are.
        variant: a registered name ("antipasto") or a configuration (``AntiPaSTO(r=64)``).
        r: upper bound of the rank; wins over the configuration's.
        target_modules: "all-linear" (all but tied weights and the output head), "residual-writers", a list of name
            suffixes, or a regular expression for whole keys, as in PEFT; the variant's own default if None.
        exclude_modules: suffixes or a regular expression of sites to leave out.
        layers_to_transform: index or indices of the layers to keep to.
        rank_pattern: ranks of single sites by pattern.
        example_inputs: dict, tuple or tensor to capture with; ``transformers`` models have defaults.
        calibration: data that the factors are chosen by: an iterable of batches (each like ``example_inputs``; padding
            is left out by ``attention_mask``), a :class:`Contrast`, or :class:`Statistics` that were collected before.
            Of a plain module, the first batch also serves as ``example_inputs``.
        form: "delta" (``W`` as it is, plus the change), or "residual" (``W_res`` in place of ``W``, as the original has
            it; a weight that is read without a call keeps delta form).
        lowering: how sites are computed: "auto" decides in each forward by a cost model, "measure" by timing the
            candidates on the example inputs now, and a name ("lowrank", "output", "dense") wherever it is possible;
            "residual" is another word for that form.
            Products of weights that are read without a call, and graphs, have one way each.
        keep_base: in residual form, keep the base weights, on the CPU, for ``undo_surgery``.
        basis: how factors are chosen: a registered name ("corda") or a configuration (``CorDA(cov_eps=1e-2)``); the
            variant's own if None.
        seed: of the core's initial values.
        progress: show progress bars on the standard error stream; None shows them on a terminal. Nothing else is
            printed: ``report(model)`` tells what was done.

    Returns:
        The same model; a new ``GraphModule`` of an ``ExportedProgram`` or a TorchScript module.

    Raises:
        SurgeryError: with the model as it was; the subclass says what is wrong (see ``passes.errors``).
    """
    progress = wanted_on(progress)
    config = resolve_variant(variant, r, basis)
    if example_inputs is None and calibration is not None and not is_pretrained(unwrap(model)):
        example_inputs, calibration = first_batch(calibration)
    given: nn.Module
    given, model = resolve_model(model, example_inputs)
    is_graph = isinstance(model, fx.GraphModule)
    form_name, lowering = check_options(config, calibration, form, lowering, keep_base, seed, is_graph)
    with transaction(model):  # also of what capture and calibration leave where they are interrupted
        adopted = adopt_roots(model) if state_of(model) is None else Adopted()
        plan = make_plan(
            model,
            config,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            rank_pattern=rank_pattern,
            example_inputs=example_inputs,
        )
        adopted.check_disjoint({site.key for site in plan.sites})
        kinds = {site.key: config.statistic for site in plan.sites}
        statistics = None
        if calibration is not None:
            statistics = collect(model, plan.sites, plan.called, kinds, calibration, progress=progress)
        wanted = [(site, config, plan.ranks[site.key], plan.hosts[site.key]) for site in plan.sites]
        plans, notes = plan_adapters(model, wanted, statistics, seed, progress=progress)
        plans = [replace(new, lowering=lowering, form=form_name, keep_base=keep_base) for new in plans]

        def finish() -> None:
            adopted.keep_training(record_of(model))
            if lowering == "measure":
                measure(model, example_inputs, progress=progress)

        plans, notes = [*adopted.plans, *plans], adopted.factorisation | notes
        operate(model, plans, plan.inspection, plan.products, notes, finish, adopted.brought)
    return given


def operate(
    model: nn.Module,
    plans: Iterable[AdapterPlan],
    inspection: Inspection | None,
    products: Products,
    notes: dict[str, JsonObject],
    finish: Callable[[], None] = lambda: None,
    trained: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Attach all adapters, freeze the rest and finish; within a transaction, which undoes what is done if it fails.

    Args:
        trained: what was trained beside the cores, to put in the place of the model's own, by name.
    """
    is_new = state_of(model) is None
    if is_new:
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        make_root(model, State(flags, inspection, {}, graph_state(model, products)))
        record_of(model).replaced = bring(model, trained or {})
        model.requires_grad_(False)
    state = record_of(model)
    with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode could never be trained
        attach_all(model, plans, state.original, products)
        share_steering(model, state)
    for tensor in (trained or {}).values():
        tensor.requires_grad_(isinstance(tensor, nn.Parameter))
    state.factorisation.update(notes)
    finish()
    dropped = {plan.site.key for plan in plans if not plan.keep_base}
    for key, site in adapters_of(model).items() if dropped else ():
        if key in dropped and site.host.set_aside is not None:
            site.host.drop_base(site.base_weight.fingerprint())
    if is_new:
        state.buffers = watched_buffers(model)


def undo_surgery(model: Model) -> Model:
    """Take every adapter off: every tensor, module and ``requires_grad`` flag is what it was, bit for bit.

    Parameters that ``load_adapter`` brought beside the cores give way to the model's own. What was trained in these
    stays as it was trained, and a warning says so.

    Raises:
        SurgeryError: the model carries no surgery, or is a part of a model that was operated on.
    """
    stays = [name for root in roots_of(model) for name in trained_in_place(root)]
    restore_base(model)
    say_what_stays(stays)
    return model


def restore_base(model: Model) -> Model:
    """Undo surgery without a word; of an operated copy, whose owner undoes nothing."""
    for root in roots_of(model):
        state = record_of(root)
        found = adapters_of(root)
        require_bases(found)
        with transaction(root, forwards=False):
            detach_all(root, found)
            restore_flags(root, state.requires_grad)
            unmake_root(root)
    return model


def detach_all(model: nn.Module, found: Mapping[str, Adapter]) -> None:
    """Take every adapter off an operated model, and what was loaded beside the cores.

    Args:
        found: the adapters.
    """
    state = record_of(model)
    for site in found.values():
        if not site.host.inlined:
            site.host.detach()
    put_back(state)
    if state.original is not None:
        assert isinstance(model, fx.GraphModule)
        restore_state(model, state.original)


def inspect_sites(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Inspection:
    """Find the sites of an untouched model: name, shape, input group, ties, role, and what was skipped and why.

    Args:
        model: any ``nn.Module``, operated on or not.
        example_inputs: dict, tuple or tensor; ``transformers`` models have defaults.

    Raises:
        InputError: the model does not run on the example inputs.
    """
    _, model = resolve_model(model, example_inputs)
    return inspection_of(model, example_inputs)
