"""What a trained core means at a site: the identity of the base weight, of its factors and of the variant's settings.

The metadata of exported programs holds it, the names of an ONNX graph's cores hold a digest of it, and whoever puts
another core in compares it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import nn

from surgery.hosting.beside_cores import beside_cores
from surgery.hosting.root import roots_of
from surgery.modules.adapter import Adapter
from surgery.storage.saved_names import SavedNames
from surgery.storage.site_entry import FACTORS
from surgery.storage.trained_parameters import trained_entries
from surgery.support.distributed import whole
from surgery.support.fingerprint import dtype_name, fingerprint
from surgery.support.untrusted_files import JsonObject
from surgery.variants import Variant


@dataclass(frozen=True)
class TensorSignature:
    """Shape and dtype of a tensor, and of a frozen one its fingerprint."""

    shape: tuple[int, ...]
    dtype: str
    fingerprint: str | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor, *, frozen: bool = False) -> TensorSignature:
        """The signature of a tensor."""
        return cls(tuple(tensor.shape), dtype_name(tensor), fingerprint(tensor) if frozen else None)

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has this shape and this dtype."""
        return (tuple(tensor.shape), dtype_name(tensor)) == (self.shape, self.dtype)


@dataclass(frozen=True)
class SiteSignature:
    """What two sites must share for a core of one to mean the same in the other.

    Attributes:
        variant: its name.
        hyperparameters: of the variant, as JSON has them.
        r: the rank.
        fingerprint: of the base weight.
        core: its tensors by their names in the variant.
        factors: ``U``, ``S`` and ``Vh``.
        layout: "out_in" or "in_out"; None where a program's file does not say.
    """

    variant: str
    hyperparameters: JsonObject
    r: int
    fingerprint: str
    core: Mapping[str, TensorSignature]
    factors: Mapping[str, TensorSignature]
    layout: str | None = None

    @classmethod
    def of(cls, site: Adapter) -> SiteSignature:
        """The signature of a site of a model; the base weight and the factors are hashed."""
        base = site.host.base_fingerprint or site.base_weight.fingerprint()
        core = {name: TensorSignature.of(tensor) for name, tensor in site.core.tensors().items()}
        factors = {name: TensorSignature.of(getattr(site.factors, name), frozen=True) for name in FACTORS}
        settings = _as_json(site.variant)
        return cls(site.variant.name, settings, site.factors.rank, base, core, factors, site.layout)

    @classmethod
    def of_file(
        cls, variant: Variant, r: int, base: str, parts: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> SiteSignature:
        """The signature of a site of an adapter's file, whose factors are not hashed.

        Args:
            base: the fingerprint of the base weight.
            parts: the tensors of "core" and "factors" by name.
        """
        core, factors = (
            {name: TensorSignature.of(tensor) for name, tensor in parts[part].items()} for part in ("core", "factors")
        )
        return cls(variant.name, _as_json(variant), r, base, core, factors)

    def difference(self, program: SiteSignature) -> str | None:
        """What keeps a core of this site from being put into a program, or None; of tensors, the names alone."""
        if self.fingerprint != program.fingerprint:
            return "the adapter was made for another base weight (fingerprints differ)"
        for name, own, wanted in (("variant", self.variant, program.variant), ("r", self.r, program.r)):
            if own != wanted:
                return f"{name} is {own!r}, the program has {wanted!r}"
        mine, theirs = self.hyperparameters, program.hyperparameters
        if odd := sorted(name for name in mine | theirs if name != "r" and mine.get(name) != theirs.get(name)):
            return f"{odd[0]} is {mine.get(odd[0])!r}, the program has {theirs.get(odd[0])!r} in its code"
        for part, tensors, expected in (
            ("core", self.core, program.core),
            ("factors", self.factors, program.factors),
        ):
            if tensors.keys() != expected.keys():
                return f"{part} has {sorted(tensors)}, expected {sorted(expected)}"
        return None


def beside_fingerprints(model: nn.Module) -> dict[str, str]:
    """Fingerprints of what was trained beside the cores of a model, by the names of its tensors in an adapter's file.

    A program has these values in it, and a core means nothing beside others.
    """
    found: dict[str, str] = {}
    for root in roots_of(model):
        tensors = trained_entries(beside_cores(root), SavedNames(root, ()), whole)[1]
        found |= {name: fingerprint(tensor) for name, tensor in tensors.items()}
    return found


def digest(signatures: Mapping[str, SiteSignature], beside: Mapping[str, str] | None = None) -> str:
    """Twelve hexadecimal digits that two models share if a core of one means the same in the other.

    Args:
        beside: what was trained beside the cores, see :func:`beside_fingerprints`.
    """
    only_factors = {field.name for field in fields(Variant)}  # these decide on the factors alone, which are hashed
    hashed = hashlib.sha256()
    for key, site in sorted(signatures.items()):
        settings = {name: value for name, value in site.hyperparameters.items() if name not in only_factors}
        factors = [site.factors[name].fingerprint for name in FACTORS]
        shapes = {name: list(tensor.shape) for name, tensor in site.core.items()}
        entry = [key, site.layout, site.variant, settings, site.fingerprint, factors, shapes]
        hashed.update(json.dumps(entry, sort_keys=True).encode())
    if beside:
        hashed.update(json.dumps(beside, sort_keys=True).encode())
    return hashed.hexdigest()[:12]


def _as_json(variant: Variant) -> JsonObject:
    settings: JsonObject = json.loads(json.dumps(variant.hyperparameters()))
    return settings
