"""The bases: how the factors of a site are chosen. One file each, found without any list.

A file in this package defines one frozen dataclass that derives from :class:`Basis` and names itself in ``name``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from surgery.errors import VariantError
from surgery.factors.statistic import Kind, Statistic
from surgery.factors.svd import Factorisation
from surgery.support.configuration import Configuration, configured, import_all

REGISTRY: dict[str, type[Basis]] = {}
Property = Literal["contrast data", "orthonormal U", "orthonormal Vh"]
"""What a core may need of its basis."""


@dataclass(frozen=True)
class Basis(Configuration):
    """Configuration of how the factors ``U``, ``S``, ``Vh`` of a weight are chosen."""

    kind: ClassVar[str] = "basis"
    gives: ClassVar[frozenset[Property]] = frozenset({"orthonormal U"})
    """What cores, lowerings and certificates may rely on.

    - "orthonormal U": ``U^T U = I`` and ``S * h = U^T (W x)``, so that the projection can be taken from the output.
    - "orthonormal Vh": ``Vh Vh^T = I``; with the former these are singular triples of the weight.
    - "contrast data": it is chosen by two sets of inputs, and gives the frozen ``direction`` (r,) from one to the
      other, and the ``midpoint`` (r,) between them.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.name:
            REGISTRY[cls.name] = cls

    @property
    def statistic(self) -> Kind:
        """What calibration collects for it (see ``surgery.factors.statistic``)."""
        return "moment"

    @property
    def needs_calibration(self) -> bool:
        """Whether there are no factors without calibration data."""
        return False

    def factorise(self, weight: torch.Tensor, r: int, statistic: Statistic | None, seed: int) -> Factorisation:
        """Choose the factors of a site.

        Args:
            weight: (d_out, d_in).
            r: at most ``min(d_out, d_in)``.
            statistic: what calibration collected at this site; None without calibration.
            seed: of a randomised factorisation.

        Returns:
            Factors with S descending and not negative; ``U diag(S) Vh`` is what the directions hold of the weight.
        """
        raise VariantError(f"basis {self.name!r} defines no factors")


def basis_of(given: object, defaults: object = None) -> Basis:
    """A basis, from a registered name, a configuration, or what an adapter file says of one.

    Args:
        defaults: of a name, an object whose fields it shares.

    Raises:
        VariantError: there is none such.
    """
    return configured(REGISTRY, Basis, given, defaults)


import_all(__name__, __path__)
