"""Put other adapters in the place of those that a model carries, or leave it as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from surgery.hosting.attach import AdapterPlan
from surgery.hosting.checks import check_weight
from surgery.hosting.root import unmake_root
from surgery.hosting.state import adapters_of, restore_flags, state_of
from surgery.hosting.transaction import transaction
from surgery.planning.surgery_plan import known_inspection
from surgery.support.untrusted_files import JsonObject
from surgery.verbs.apply import detach_all, operate


def replace_adapters(model: nn.Module, make: Callable[[], tuple[list[AdapterPlan], dict[str, JsonObject]]]) -> None:
    """Take all adapters off, make new ones on the intact model, and attach them; on any failure the old ones are back.

    Args:
        make: gives the new adapters, and what is noted of their factorisation; form and lowering stay what they are.
    """
    state = state_of(model)
    options: dict[str, JsonObject] = {
        key: {"lowering": site.lowering, "form": site.form} for key, site in adapters_of(model).items()
    }
    inspection = known_inspection(model)
    with transaction(model):
        if state:
            detach_all(model)
            restore_flags(model, state.requires_grad)
            unmake_root(model)
        plans, notes = make()
        for plan in plans:
            check_weight(model, plan.site)
        operate(model, [replace(plan, **options.get(plan.site.key, {})) for plan in plans], inspection, notes)
