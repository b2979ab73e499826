"""What every variant is: a core on a basis, with one configuration for both."""

from __future__ import annotations

import contextlib
import functools
import operator
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch

from surgery.bases import REGISTRY as BASES
from surgery.bases import Basis, basis_of
from surgery.bases.top_svd import SVD
from surgery.cores import CoreConfig, CoreTensors, core_of
from surgery.errors import RankError, VariantError
from surgery.factors.statistic import Kind, Statistic
from surgery.factors.svd import METHODS, Factorisation, Method
from surgery.support.configuration import Configuration, as_entry, shared
from surgery.support.untrusted_files import JsonObject

REGISTRY: dict[str, type[Variant]] = {}
OF_THE_CORE = ("linear", "depends_only_on_Sh", "default_targets", "middle_layers", "prepares")


@dataclass(frozen=True)
class Variant(Configuration):
    """Configuration shared by all variants; a field of its basis or its core is passed on under the same name.

    Attributes:
        r: upper bound of the rank; a site uses ``min(r, d_out, d_in)``.
        factors_dtype: dtype name of the stored factors ("float32"); None keeps the weight's own.
        svd_method: "exact", "randomised" (where the rank is small and the spectrum not too wide for it, else exact), or
            "auto" (randomised for large weights and small ranks only).
        basis: how the factors are chosen: a registered name, which takes fields of the same names from the variant, or
            a configuration; None is the variant's own, and so is a configuration of the own kind once it is read.
    """

    r: int = 256
    factors_dtype: str | None = None
    svd_method: Method = "auto"
    basis: str | Basis | None = field(default=None, kw_only=True)

    kind: ClassVar[str] = "variant"
    own_basis: ClassVar[type[Basis]] = SVD
    own_core: ClassVar[type[CoreConfig]] = CoreConfig
    is_default: ClassVar[bool] = False
    """Whether commands take this variant where none is named."""

    # those of the core, here too
    linear: ClassVar[bool] = CoreConfig.linear
    depends_only_on_Sh: ClassVar[bool] = CoreConfig.depends_only_on_Sh
    default_targets: ClassVar[str] = CoreConfig.default_targets
    middle_layers: ClassVar[bool] = CoreConfig.middle_layers
    prepares: ClassVar[bool] = CoreConfig.prepares

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in OF_THE_CORE:
            if name not in vars(cls):
                setattr(cls, name, getattr(cls.own_core, name))
        if cls.name:
            REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        if not isinstance(self.r, bool):
            with contextlib.suppress(TypeError):  # what is no integer is refused below
                self._set("r", operator.index(self.r))
        if isinstance(self.factors_dtype, torch.dtype):
            self._set("factors_dtype", str(self.factors_dtype).removeprefix("torch."))
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise RankError(f"r must be an integer of at least 1, found {self.r!r:.80}")
        if self.factors_dtype is not None:
            self.one_of("factors_dtype", ("float16", "bfloat16", "float32", "float64"))
        self.one_of("svd_method", METHODS)
        super().__post_init__()
        if self.basis is not None:
            self._read_basis()
        check_pair(self.basis_config, self.core_config)
        if "orthonormal U" not in self.basis_config.gives:  # nothing can be projected from the output then
            self._set("depends_only_on_Sh", False)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen for everybody else

    def _read_basis(self) -> None:
        """Make a configuration of what ``basis`` was given as; one of the variant's own kind becomes its fields."""
        basis = basis_of(self.basis, defaults=self)
        settings = {f.name: getattr(basis, f.name) for f in fields(basis)}
        if type(basis) is self.default_basis() and settings.keys() <= {f.name for f in fields(self)}:
            for name, value in settings.items():
                self._set(name, value)
            self._set("basis", None)
        else:
            self._set("basis", basis)

    def default_basis(self) -> type[Basis]:
        """The basis that the variant has where none is given."""
        return self.own_basis

    @functools.cached_property
    def basis_config(self) -> Basis:
        """The basis that is in force."""
        return self.basis if isinstance(self.basis, Basis) else shared(self.default_basis(), self)

    @functools.cached_property
    def core_config(self) -> CoreConfig:
        """The core."""
        return shared(self.own_core, self)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Core tensors that are not trained."""
        return self.core_config.frozen

    @property
    def identity_at_init(self) -> bool:
        """Whether delta is an exact zero at the initial core."""
        return self.core_config.identity_at_init

    @property
    def statistic(self) -> Kind:
        """What calibration collects for this variant (see ``surgery.factors.statistic``)."""
        return self.basis_config.statistic

    @property
    def needs_calibration(self) -> bool:
        """Whether there are no factors without calibration data."""
        return self.basis_config.needs_calibration

    def factorise(self, weight: torch.Tensor, r: int, statistic: Statistic | None, seed: int) -> Factorisation:
        """Choose the factors of a site (see ``Basis.factorise``)."""
        return self.basis_config.factorise(weight, r, statistic, seed)

    def rank(self, limit: int) -> int:
        """The largest rank up to ``limit`` that the variant can use."""
        return self.core_config.rank(limit)

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Initial core tensors of a site of rank r, in float32 on the CPU; frozen ones as placeholders."""
        return self.core_config.init_core(r, generator)

    def prepare(self, core: CoreTensors) -> dict[str, torch.Tensor]:
        """Tensors that depend on the core's values alone (see ``CoreConfig.prepare``); none unless ``prepares``."""
        return self.core_config.prepare(core)

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """The change in S-space (see ``CoreConfig.delta``)."""
        return self.core_config.delta(h, S, core, coeff)

    def hyperparameters(self) -> JsonObject:
        """All fields as plain values, for the adapter file; the basis only where it is not the variant's own."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: as_entry(v) if isinstance(v, Configuration) else v for name, v in values.items()}
        return {name: value for name, value in plain.items() if name != "basis" or value is not None}


@dataclass(frozen=True)
class BasisCore(Variant):
    """Every core on every basis; ``"corda+arrow"`` is ``BasisCore(core="arrow", basis="corda")``.

    Attributes:
        core: a registered name, or a configuration.
        basis: of None, the first that gives what the core needs, ``svd`` before others.
    """

    core: str | CoreConfig = field(kw_only=True)

    def __post_init__(self) -> None:
        self._set("core", core_of(self.core))
        super().__post_init__()
        for name in OF_THE_CORE:
            if name != "depends_only_on_Sh" or self.depends_only_on_Sh:
                self._set(name, getattr(self.core_config, name))
        self._set("name", f"{self.basis_config.name}+{self.core_config.name}")

    def default_basis(self) -> type[Basis]:
        """The top-r SVD, or where that does not give what the core needs, the first basis that does."""
        bases: list[type[Basis]] = [SVD, *BASES.values()]
        return next((basis for basis in bases if self.core_config.needs <= basis.gives), SVD)

    @functools.cached_property
    def core_config(self) -> CoreConfig:
        """The core."""
        return core_of(self.core)


def check_pair(basis: Basis, core: CoreConfig) -> None:
    """Refuse a core on a basis that does not give what it needs.

    Raises:
        VariantError: says what is missing, and which bases have it.
    """
    if missing := sorted(core.needs - basis.gives):
        able = sorted(name for name, other in BASES.items() if core.needs <= other.gives)
        where = f"basis={' or '.join(map(repr, able))}" if able else "a basis that does; none is registered"
        raise VariantError(
            f"core {core.name!r} needs {' and '.join(missing)}, which basis {basis.name!r} does not give: use {where}"
        )
