"""Put other adapters in the place of those that a model carries, or leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from passes.capture.graph_products import Products
from surgery.hosting.attach import AdapterPlan
from surgery.hosting.beside_cores import brought_by_name, say_what_stays, trained_in_place
from surgery.hosting.checks import check_weight
from surgery.hosting.root import unmake_root
from surgery.hosting.state import record_of, restore_flags, state_of
from surgery.hosting.transaction import transaction
from surgery.modules.adapter import Adapter
from surgery.planning.surgery_plan import known_inspection
from surgery.support.untrusted_files import JsonObject
from surgery.verbs.apply import detach_all, operate


def replace_adapters(
    model: nn.Module,
    present: Mapping[str, Adapter],
    products: Products,
    make: Callable[[], tuple[list[AdapterPlan], dict[str, JsonObject]]],
    trained: Mapping[str, torch.Tensor] | None = None,
    finish: Callable[[], None] | None = None,
) -> None:
    """Take all adapters off, make new ones on the intact model, and attach them; on any failure the old ones are back.

    Args:
        present: the adapters that the model carries.
        products: of a graph, those that an adapter can be written beside.
        make: gives the new adapters, and what is noted of their factorisation; form and lowering stay what they are.
        trained: what is beside the new cores, by name; None for all that was trained or loaded until now.
        finish: sets what the new adapters take from the old ones; where it fails, the old ones are back as well.
    """
    state = state_of(model)
    options: dict[str, JsonObject] = {
        key: {"lowering": site.lowering, "form": site.form} for key, site in present.items()
    }
    inspection = known_inspection(model)
    stays, keep = trained_in_place(model) if state else [], trained is None
    if keep and state:
        trained = brought_by_name(model, state)
    with transaction(model):
        if state:
            detach_all(model, present)
            restore_flags(model, state.requires_grad)
            unmake_root(model)
        plans, notes = make()
        for plan in plans:
            check_weight(model, plan.site)
        plans = [replace(plan, **options.get(plan.site.key, {})) for plan in plans]
        operate(model, plans, inspection, products, notes, trained=trained)
        if finish is not None:
            finish()
        if keep and state:
            record_of(model).brought_in_place = state.brought_in_place | set(stays)
        else:
            say_what_stays([name for name in stays if trained is None or name not in trained])
