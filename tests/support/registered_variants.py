"""Every configuration that is registered."""

from __future__ import annotations

import dataclasses

from surgery.variants import REGISTRY, Variant


def configurations() -> list[Variant]:
    """Every registered variant as it is by default, and once more for each of its switches turned."""
    default = [cls() for cls in REGISTRY.values()]
    switches = [(v, f.name) for v in default for f in dataclasses.fields(v) if isinstance(getattr(v, f.name), bool)]
    return default + [dataclasses.replace(v, **{name: not getattr(v, name)}) for v, name in switches]


VARIANTS = configurations()
