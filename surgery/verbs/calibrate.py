"""``calibrate`` and ``recalibrate``: collect statistics, and choose the factors of an operated model anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from passes.capture.capture import is_pretrained
from passes.errors import InputError, SurgeryError
from passes.ir.forward_context import ExampleInputs, outside_inference_mode
from surgery.factors.statistics_file import Statistics
from surgery.hosting.attach import AdapterPlan, plan_of
from surgery.hosting.checks import check_flags, check_seed, check_whole
from surgery.hosting.graph_surgery import products_of
from surgery.hosting.state import (
    adapters_in,
    check_there,
    module_paths,
    record_of,
    require_bases,
    restore_flags,
    unwrap,
)
from surgery.modules.adapter import Adapter
from surgery.planning.adapter_init import Wanted, initial_core, plan_adapters
from surgery.planning.calibration_run import collect, first_batch
from surgery.planning.surgery_plan import known_inspection, make_plan
from surgery.planning.target_selection import Patterns
from surgery.support.progress_bar import wanted_on
from surgery.support.untrusted_files import JsonObject
from surgery.variants import Variant, resolve_variant
from surgery.verbs.apply import Model, resolve_model
from surgery.verbs.argument_types import Calibration
from surgery.verbs.replace_adapters import replace_adapters
from surgery.verbs.steer import present, write_coefficient


def calibrate(
    model: nn.Module,
    variant: str | Variant,
    calibration: Calibration,
    *,
    r: int | None = None,
    target_modules: Patterns | None = None,
    exclude_modules: Patterns | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    example_inputs: ExampleInputs | None = None,
    progress: bool | None = None,
) -> Statistics:
    """Run data through a model and collect what a variant chooses its factors by; the model is left as it was.

    The result can be saved, merged with that of another run (``a + b``), and given to ``recalibrate`` or
    ``apply_surgery(calibration=...)``.

    Args:
        model, variant, r, target_modules, exclude_modules, layers_to_transform, rank_pattern, example_inputs: as in
            ``apply_surgery``.
        calibration: an iterable of batches, or a :class:`Contrast`.
        progress: show a progress bar; None: on a terminal.

    Raises:
        SurgeryError: as ``apply_surgery``.
    """
    bars = wanted_on(progress)
    config = resolve_variant(variant, r)
    if example_inputs is None and not is_pretrained(unwrap(model)):
        example_inputs, calibration = first_batch(calibration)
    _, module = resolve_model(model, example_inputs)
    plan = make_plan(
        module,
        config,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform,
        rank_pattern=rank_pattern,
        example_inputs=example_inputs,
    )
    kinds = {site.key: config.statistic for site in plan.sites}
    return collect(module, plan.sites, plan.called, kinds, calibration, progress=bars)


@outside_inference_mode
def recalibrate(
    model: Model, calibration: Calibration, *, reset: bool = False, seed: int = 0, progress: bool | None = None
) -> Model:
    """Choose the factors of every site anew by data, and start every core anew: gains belong to the basis they were
    trained in.

    The data runs through the base model. Ranks, variants, flags and ``coeff`` stay what they are; cores are new
    parameters, so that an optimiser has to be made anew. On any failure the model is what it was.

    Args:
        calibration: an iterable of batches, a :class:`Contrast`, or :class:`Statistics`.
        reset: drop cores that are not at their initial value, and with them what was trained.
        seed: of the cores' initial values.
        progress: show progress bars; None: on a terminal.

    Raises:
        SurgeryError: the model carries no surgery, a core is trained and ``reset`` is false, or a base weight was not
            kept.
        InputError: as ``apply_surgery``.
    """
    given: Model = model
    check_flags(reset=reset)
    bars = wanted_on(progress)
    check_seed(seed)
    inner: nn.Module = unwrap(model)
    record = record_of(inner)
    paths = module_paths(inner)
    found = adapters_in(paths)
    require_bases(found)
    if calibration is None:
        raise InputError("recalibrate needs calibration data: an iterable of batches, a Contrast or Statistics")
    for key, site in found.items():
        check_whole(key, site.base_weight)
        check_there(key, site)
        if not reset and is_trained(key, site, record.factorisation.get(key, {}).get("seed", 0)):
            raise SurgeryError(
                f"site {key!r}: its core is not at its initial value, and would mean nothing in another basis; save or "
                "merge it first, then recalibrate(..., reset=True)"
            )
    inspection = known_inspection(inner)
    sites = {site.key: site for site in inspection.sites} if inspection else {}
    wanted: list[Wanted] = []
    for key, site in found.items():
        plan = plan_of(paths, key, site)
        place = replace(plan.site, group=sites[key].group) if key in sites else plan.site
        wanted.append((place, site.variant, site.factors.rank, plan.host))
    coefficient = present(record)

    def make() -> tuple[list[AdapterPlan], dict[str, JsonObject]]:
        kinds = {place.key: variant.statistic for place, variant, _, _ in wanted}
        called = {place.key for place, _, _, host in wanted if host == "module"}
        statistics = collect(inner, [w[0] for w in wanted], called, kinds, calibration, progress=bars)
        plans, notes = plan_adapters(inner, wanted, statistics, seed, progress=bars)
        for plan in plans:
            plan.core.scale = found[plan.site.key].core.scale
        return plans, notes

    def finish() -> None:
        restore_flags(inner, flags)
        write_coefficient(record_of(inner), coefficient)

    flags = {name: p.requires_grad for name, p in inner.named_parameters()}
    replace_adapters(inner, found, products_of(inner), make, finish=finish)
    return given


def is_trained(key: str, site: Adapter, seed: int) -> bool:
    """Whether a core is anywhere but at the initial value of its seed."""
    tensors = initial_core(site.variant, key, site.factors.rank, seed, site.factors.stack)
    parameters = dict(site.core.named_parameters())
    return not all(torch.equal(parameters[name].cpu(), tensors[name].to(parameters[name].dtype)) for name in parameters)
