"""The variants: one file each, found without any list. A variant is its factors, its core and one pure ``delta(h)``.

A file in this package defines one frozen dataclass that derives from :class:`Variant` and names itself in ``name``.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import operator
import pkgutil
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Protocol

import torch

from surgery.errors import RankError, VariantError
from surgery.factors.oriented_svd import oriented
from surgery.factors.statistic import POOLS, Statistic, required, reranked
from surgery.factors.svd import METHODS, Factorisation, factorise

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
        svd_method: "exact", "randomised" (where the rank is small and the spectrum not too wide for it, else exact), or
            "auto" (randomised for large weights and small ranks only).
    """

    r: int = 256
    factors_dtype: str | None = None
    svd_method: str = "auto"

    name: ClassVar[str] = ""
    linear: ClassVar[bool] = True
    """Whether delta is linear in h: only then are there a delta weight, a merge and a LoRA."""
    is_default: ClassVar[bool] = False
    """Whether commands take this variant where none is named."""
    of_scaled: ClassVar[bool] = True
    """Whether delta depends on h by ``S * h`` alone: only then can the projection be taken from the output."""
    default_targets: ClassVar[str] = "all-linear"
    frozen: ClassVar[tuple[str, ...]] = ()
    """Core tensors that are not trained: they come with the factors."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        if not isinstance(self.r, bool):
            with contextlib.suppress(TypeError):  # what is no integer is refused below
                object.__setattr__(self, "r", operator.index(self.r))
        if isinstance(self.factors_dtype, torch.dtype):
            object.__setattr__(self, "factors_dtype", str(self.factors_dtype).removeprefix("torch."))
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise RankError(f"r must be an integer of at least 1, found {self.r!r:.80}")
        if self.factors_dtype is not None:
            self.one_of("factors_dtype", ("float16", "bfloat16", "float32", "float64"))
        self.one_of("svd_method", METHODS)
        for field in fields(self):
            if isinstance(field.default, bool) and not isinstance(getattr(self, field.name), bool):
                raise VariantError(f"{field.name} must be True or False, found {getattr(self, field.name)!r:.80}")

    def one_of(self, name: str, known: Sequence[str]) -> None:
        """Refuse a value of a field that is none of the known ones."""
        value = getattr(self, name)
        if not isinstance(value, str) or value not in known:
            raise VariantError(f"{name} must be one of {', '.join(known)}, found {value!r:.80}")

    def number(self, name: str, *, least: float, most: float = math.inf, whole: bool = False) -> None:
        """Refuse a value of a field that is not a number from ``least`` to ``most``."""
        value, kinds = getattr(self, name), (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most or value == math.inf:
            limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise VariantError(f"{name} must be {'an integer' if whole else 'a number'} {limits}, found {value!r:.80}")

    @property
    def identity_at_init(self) -> bool:
        """Whether delta is an exact zero at the initial core."""
        return True

    @property
    def statistic(self) -> str:
        """What calibration collects for this variant (see ``surgery.factors.statistic``)."""
        return "moment"

    @property
    def needs_calibration(self) -> bool:
        """Whether there are no factors without calibration data."""
        return False

    def factorise(self, weight: torch.Tensor, r: int, statistic: Statistic | None, seed: int) -> Factorisation:
        """Choose the factors of a site: the r largest singular triples.

        Args:
            weight: (d_out, d_in).
            statistic: what calibration collected at this site; None without calibration.
            seed: of a randomised factorisation.
        """
        return factorise(weight, r, self.svd_method, seed)

    def rank(self, limit: int) -> int:
        """The largest rank up to ``limit`` that the variant can use."""
        return limit

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Initial core tensors of a site of rank r, in float32 on the CPU; frozen ones as placeholders."""
        raise VariantError(f"{self.name} defines no core")

    def prepare(self, core: CoreTensors) -> dict[str, torch.Tensor]:
        """Tensors that depend on the core's values alone; without gradients they are kept between forwards, and delta
        finds them beside the core's own."""
        return {}

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


@dataclass(frozen=True)
class Reranked(Variant):
    """A variant on singular directions of the weight: the largest, or with calibration data those that carry most.

    With data these are the r directions of the largest ``S_i * pool_n |x_n . v_i|``, in descending order of S.

    Attributes:
        pool: "rms" or "mean_abs", over the tokens n.
    """

    pool: str = "rms"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("pool", tuple(POOLS))

    @property
    def statistic(self) -> str:
        """The second moment gives the rms of every projection; the mean absolute value needs the projections."""
        return POOLS[self.pool]

    def factorise(self, weight: torch.Tensor, r: int, statistic: Statistic | None, seed: int) -> Factorisation:
        """The top triples, or those that a statistic ranks highest."""
        if statistic is None:
            return factorise(weight, r, self.svd_method, seed)
        return reranked(weight, r, statistic)


@dataclass(frozen=True)
class Oriented(Variant):
    """A variant on directions that are oriented by the second moment of the site's input, which calibration gives.

    Attributes:
        cov_eps: added to the diagonal of that moment.
        cov_eps_relative: take ``cov_eps`` as a share of the mean of that diagonal.
    """

    cov_eps: float = 1e-3
    cov_eps_relative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.number("cov_eps", least=0)

    @property
    def needs_calibration(self) -> bool:
        """There is no moment without data."""
        return True

    def factorise(self, weight: torch.Tensor, r: int, statistic: Statistic | None, seed: int) -> Factorisation:
        """``U``, ``S`` and the oblique projector ``P`` in the place of ``Vh``."""
        return oriented(weight, r, required(statistic), self.cov_eps, relative=self.cov_eps_relative)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

DEFAULT = next(name for name, cls in REGISTRY.items() if cls.is_default)
