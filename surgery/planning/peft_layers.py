"""Models that PEFT has wrapped: sites are PEFT's base layers; what PEFT has put beside them is left to PEFT.

PEFT merges and saves ``lora_A`` and its like by their weights, so that an adapter on them would be lost there without a
word. Of a module that PEFT keeps twice, only one copy is called, and which one may change.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from torch import nn

from passes.analysis.linear_sites import Site, Skipped
from passes.capture.inspect_model import Inspection

BASE = "base_layer"
BESIDE = "a part of PEFT's own adapter, which stays as it is, frozen; merge_and_unload() makes it a part of the base"
TWICE = "one of the copies that PEFT keeps of a module that it trains as a whole; merge_and_unload() leaves one"


def wrapped_layers(model: nn.Module) -> tuple[str, ...]:
    """Paths of the layers that PEFT has wrapped, without importing PEFT."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None:
        return ()
    return tuple(path for path, module in model.named_modules() if isinstance(module, peft.BaseTunerLayer))


def base_sites(model: nn.Module, inspection: Inspection) -> Inspection:
    """An inspection in which what belongs to PEFT is no site, with the reason."""
    layers = wrapped_layers(model)
    other = sys.modules.get("peft.utils.other")
    copies: tuple[str, ...] = ()
    if other is not None:
        wrapper = other.ModulesToSaveWrapper
        copies = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, wrapper))
    if not layers and not copies:
        return inspection
    sites: list[Site] = []
    skipped = list(inspection.skipped)
    for site in inspection.sites:
        within = max((path for path in layers if site.weight.startswith(f"{path}.")), key=len, default=None)
        reason = TWICE if site.weight.startswith(copies) else None
        if within is not None and not site.weight.startswith(f"{within}.{BASE}."):
            reason = BESIDE
        if reason is None:
            sites.append(site)
        else:
            skipped.append(Skipped(site.key, site.operation or "linear", reason))
    return replace(inspection, sites=tuple(sites), skipped=tuple(skipped))


def name_before(layers: tuple[str, ...], key: str) -> str:
    """The key that a site had before PEFT wrapped its layer: patterns name it so."""
    for path in layers:
        start = f"{path}.{BASE}"
        if key == start or key.startswith(f"{start}."):
            return path + key.removeprefix(start)
    return key
