"""The cores: the tensors of a site and one pure ``delta(h)``. One file each, found without any list.

A file in this package defines one frozen dataclass that derives from :class:`CoreConfig` and names itself in ``name``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from surgery.errors import VariantError
from surgery.support.configuration import Configuration, configured, import_all

REGISTRY: dict[str, type[CoreConfig]] = {}


class CoreTensors(Protocol):
    """The core's tensors as attributes, named as in :meth:`CoreConfig.init_core`."""

    def __getattr__(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class CoreConfig(Configuration):
    """Configuration of a core, and the few functions that make one."""

    kind: ClassVar[str] = "core"
    linear: ClassVar[bool] = True
    """Whether delta is linear in h: only then are there a delta weight, a merge and a LoRA."""
    depends_only_on_Sh: ClassVar[bool] = True
    """Whether delta is a function of ``S * h``: only then can the projection be taken from the output."""
    default_targets: ClassVar[str] = "all-linear"
    middle_layers: ClassVar[bool] = False
    """Whether it goes on the middle third of the layers where neither targets nor layers are named."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """Core tensors that are not trained: the basis gives them with the factors."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What it needs of its basis (see ``Basis.gives``)."""
    prepares: ClassVar[bool] = False
    """Whether :meth:`prepare` gives anything; follows from the class."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.prepares = cls.prepare is not CoreConfig.prepare
        if cls.name:
            REGISTRY[cls.name] = cls

    @property
    def identity_at_init(self) -> bool:
        """Whether delta is an exact zero at the initial core."""
        return True

    def rank(self, limit: int) -> int:
        """The largest rank up to ``limit`` that the core can use."""
        return limit

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Initial core tensors of a site of rank r, in float32 on the CPU; frozen ones as placeholders."""
        raise VariantError(f"core {self.name!r} defines no tensors")

    def prepare(self, core: CoreTensors) -> dict[str, torch.Tensor]:
        """Tensors that depend on the core's values alone; without gradients they are cached between forwards, and delta
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
        raise VariantError(f"core {self.name!r} defines no delta")


def core_of(given: object) -> CoreConfig:
    """A core, from a registered name, a configuration, or what an adapter file says of one.

    Raises:
        VariantError: there is none such.
    """
    return configured(REGISTRY, CoreConfig, given)


import_all(__name__, __path__)
