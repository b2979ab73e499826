"""The variants: one file each, found without any list. A variant is its factors, its core and one pure ``delta(h)``.

A file in this package defines one frozen dataclass that derives from :class:`Variant` and names itself in ``name``.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Protocol

import torch

from passes.errors import RankError, VariantError

REGISTRY: dict[str, type[Variant]] = {}


class CoreTensors(Protocol):
    """The core's tensors as attributes, named as in the variant's table row."""

    def __getattr__(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Variant:
    """Configuration shared by all variants, and the few functions that make one.

    Attributes:
        r: upper bound of the rank; a site uses ``min(r, d_out, d_in)``.
        factors_dtype: dtype name of the stored factors ("float32"); None keeps the weight's own.
    """

    r: int = 256
    factors_dtype: str | None = None

    name: ClassVar[str] = ""
    linear: ClassVar[bool] = True
    """Whether delta is linear in h: only then are there a delta weight, a merge and a LoRA."""
    default_targets: ClassVar[str] = "all-linear"
    needs_calibration: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise RankError(f"r must be an integer of at least 1, found {self.r!r}")
        if self.factors_dtype is not None and self.factors_dtype not in ("float16", "bfloat16", "float32", "float64"):
            raise VariantError(f"factors_dtype must name a floating-point dtype, found {self.factors_dtype!r}")

    def rank(self, limit: int) -> int:
        """The largest rank up to ``limit`` that the variant can use."""
        return limit

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Initial core tensors of a site of rank r, in float32 on the CPU."""
        raise VariantError(f"{self.name} defines no core")

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """The change in S-space.

        Args:
            h: (..., r), the input in S-space.
            S: (r,), singular values in the core's dtype.
            core: the core's tensors.
            coeff: 0-d, or (rows, 1, ..., 1) with as many dimensions as h, in the core's dtype.

        Returns:
            (..., r) in the dtype of h; exact zeros at ``coeff = 0``.
        """
        raise VariantError(f"{self.name} defines no delta")

    def hyperparameters(self) -> dict[str, Any]:
        """All fields as plain values, for the adapter file."""
        return asdict(self)


def resolve_variant(variant: str | Variant, r: int | None = None) -> Variant:
    """Turn a registered name or a configuration into a configuration; an explicit rank wins.

    Raises:
        VariantError: the name is unknown.
        RankError: the rank is below 1.
    """
    if isinstance(variant, type) and issubclass(variant, Variant):
        variant = variant()
    if isinstance(variant, str):
        if variant not in REGISTRY:
            near = get_close_matches(variant, REGISTRY, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise VariantError(f"unknown variant {variant!r}{hint} (known: {', '.join(sorted(REGISTRY))})")
        variant = REGISTRY[variant]()
    if not isinstance(variant, Variant):
        raise VariantError(f"variant must be a name or a configuration, not {type(variant).__name__}")
    if r is None:
        return variant
    return type(variant)(**{**variant.hyperparameters(), "r": r})


def variant_from_dict(name: str, values: dict[str, Any]) -> Variant:
    """Rebuild a configuration from an adapter file.

    Raises:
        VariantError: the name, or one of the values' names, is unknown.
    """
    cls = type(resolve_variant(name))
    known = {field.name for field in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise VariantError(f"variant {name!r} has no hyper-parameter {', '.join(unknown)}")
    required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - set(values)):
        raise VariantError(f"variant {name!r} lacks the hyper-parameter {', '.join(missing)}")
    return cls(**values)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
