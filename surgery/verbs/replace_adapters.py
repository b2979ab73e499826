"""Put other adapters in the place of those that a model carries, or leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from passes.analysis.linear_sites import Site
from surgery.hosting.checks import check_weight
from surgery.hosting.hosts import Graft, host_of, operated_sites
from surgery.hosting.transaction import transaction
from surgery.modules.adapter import SSpaceLinear
from surgery.planning.surgery_plan import known_inspection
from surgery.storage.adapter_reader import parameter_names
from surgery.verbs.apply import detach_all, operate, restore_flags


def replace_adapters(model: nn.Module, make: Callable[[], tuple[list[Graft], dict[str, dict[str, Any]]]]) -> None:
    """Take all adapters off, make new ones on the intact model, and attach them; on any failure the old ones are back.

    Args:
        make: gives the new adapters, and what is noted of their factorisation; form and lowering stay what they are.
    """
    record = vars(model).get("_surgery")
    kept: dict[str, dict[str, Any]] = {
        key: {"lowering": site.lowering, "form": site.form} for key, site in operated_sites(model).items()
    }
    inspection = known_inspection(model)
    with transaction(model):
        if record:
            detach_all(model)
            restore_flags(model, record.requires_grad)
            del vars(model)["_surgery"]
        grafts, notes = make()
        for graft in grafts:
            check_weight(model, graft.site)
        operate(model, [replace(graft, **kept.get(graft.site.key, {})) for graft in grafts], inspection, notes)


def graft_of(paths: Mapping[int, str], key: str, site: SSpaceLinear) -> Graft:
    """The adapter of a site, of the model of these paths, as it can be made anew."""
    weight, bias = parameter_names(paths, site)
    d_out, d_in = site.factors.shape[-2:]
    rows = getattr(site, "rows", None)
    place = Site(key, weight, bias, site.layout, d_out, d_in, stack=site.factors.stack, rows=rows)
    return Graft(place, host_of(site), site.variant, site.factors, site.core, site.lowering, site.form)
