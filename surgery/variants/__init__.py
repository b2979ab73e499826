"""The variants: named pairs of a basis and a core. One file each, found without any list.

A file in this package defines one frozen dataclass that derives from :class:`Variant`, names itself in ``name``, its
basis in ``own_basis`` and its core in ``own_core``, and declares the fields of both that a user may set.
"""

from __future__ import annotations

from dataclasses import replace

from surgery.bases import Basis
from surgery.errors import VariantError
from surgery.support.configuration import import_all, named
from surgery.support.untrusted_files import JsonObject
from surgery.variants._variant import REGISTRY, BasisCore, Variant

__all__ = ["DEFAULT", "REGISTRY", "BasisCore", "Variant", "resolve_variant", "variant_from_dict"]


def resolve_variant(variant: str | Variant, r: int | None = None, basis: str | Basis | None = None) -> Variant:
    """Turn a registered name, a pair ("corda+arrow") or a configuration into a configuration.

    Args:
        r, basis: win over the configuration's.

    Raises:
        VariantError: a name is unknown, or the core cannot be on the basis.
        RankError: the rank is below 1.
    """
    if isinstance(variant, type) and issubclass(variant, Variant):
        variant = variant()
    if isinstance(variant, str):
        of_basis, plus, core = variant.partition("+")
        variant = BasisCore(core=core, basis=of_basis) if plus else named(REGISTRY, "variant", variant)()
    if not isinstance(variant, Variant):
        raise VariantError(f"variant must be a name or a configuration, not {type(variant).__name__}")
    variant = variant if r is None else replace(variant, r=r)
    return variant if basis is None else replace(variant, basis=basis)


def variant_from_dict(name: str, values: JsonObject) -> Variant:
    """Rebuild a configuration from an adapter file.

    Raises:
        VariantError: the name, or one of the values' names, is unknown.
    """
    variant = type(resolve_variant(name)).from_hyperparameters(values)
    if variant.name != name:
        raise VariantError(f"the hyper-parameters are those of variant {variant.name!r}, not {name!r:.80}")
    return variant


import_all(__name__, __path__)

DEFAULT = next(name for name, cls in REGISTRY.items() if cls.is_default)
