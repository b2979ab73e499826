"""Which base weight the factors of a site belong to, and whether the weight is still that one.

A parameter whose version, identity or memory has changed is compared by its fingerprint, once. Equal values are
adopted. Others are adopted where the weight requires a gradient: it is trained beside the adapter, whose factors stay
as they are. They are adopted as well where the factors were written too and are those of the new weight, as after
``load_state_dict`` with the state of another operated model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from passes.errors import SurgeryError
from surgery.modules.factor_fit import why_not_of
from surgery.support.change_detection import address_of, version_of
from surgery.support.distributed import is_sharded
from surgery.support.fingerprint import forget_fingerprints

if TYPE_CHECKING:
    from surgery.modules.adapter import Adapter

Versions = list[tuple[torch.Tensor, int]]


class WeightRecord:
    """What is known of the base weight of a site.

    Attributes:
        fingerprint: of the weight that the factors belong to; None after a cast, of which nothing is hashed.
        trained: whether the weight was trained since: the factors are no longer its own, and no lowering may take them
            for that.
    """

    def __init__(self, fingerprint: str | None = None, *, trained: bool = False) -> None:
        self.fingerprint, self.trained = fingerprint, trained
        self._dtype: torch.dtype | None = None  # that the fingerprint is of
        self._is_converted = False  # from a weight that had not changed
        self._required_grad = False  # since it was last compared
        self._seen: tuple[torch.Tensor, int, int] | None = None
        self._factors: Versions | None = None

    def adopt(self, site: Adapter, weight: torch.Tensor) -> None:
        """Take what is there for the weight that the factors belong to."""
        self._is_converted, self._required_grad, self._dtype = False, False, weight.dtype
        self._seen, self._factors = (weight, version_of(weight), address_of(weight)), _versions(site)

    def for_copy(self) -> WeightRecord:
        """The record of a copy of the site; its weight is compared when it is first seen."""
        found = WeightRecord(self.fingerprint, trained=self.trained)
        found._dtype = self._dtype
        return found

    def copied(self, site: Adapter) -> None:
        """In a copy of a site: what is written to its factors from now on is seen."""
        self._factors = _versions(site)

    def settle(self, site: Adapter, weight: torch.Tensor | None) -> None:
        """Find out whether the weight is still the one that the factors belong to.

        Args:
            weight: the parameter that holds it; None where it is computed from others, as by a parametrisation.

        Raises:
            SurgeryError: it is another one.
        """
        if weight is None or weight.is_meta or is_sharded(weight):  # not there, or compared by the verbs alone
            self._seen = None
            return
        if weight.requires_grad:
            self._required_grad = True
            return
        written = self._factors is not None and not _same(self._factors, _versions(site))
        if self._required_grad:
            self._find_out_whether_trained(site)
        elif written or not self._unchanged(weight):
            self._compare(site, written=written)
        self.adopt(site, weight)

    def require(self, site: Adapter) -> None:
        """Compare the weight by its fingerprint, whatever was seen; of a sharded one every process has to do this.

        Raises:
            SurgeryError: it is another one.
        """
        weight = site.host.registered()
        if weight is not None and is_sharded(weight) and not weight.requires_grad:
            self._compare(site, written=False)
        else:
            self.settle(site, weight)

    def forget(self, weight: torch.Tensor | None) -> None:
        """Compare the weight again, also where nothing that can be seen has changed."""
        self._seen = None
        if weight is not None:
            forget_fingerprints(weight)

    def converting(self, site: Adapter, weight: torch.Tensor | None, *, told_after: bool) -> None:
        """Before the model is moved or cast: what comes of a weight that has not changed is the recorded one.

        Args:
            told_after: whether :meth:`converted` follows. Else the next comparison asks whether the factors fit.
        """
        if weight is None or weight.is_meta or is_sharded(weight):
            return
        if self._seen is None:  # of a copy; where it is tied, it may have been cast already
            same = self._dtype != weight.dtype or site.base_weight.fingerprint() == self.fingerprint
            self.fingerprint = None if self._dtype != weight.dtype else self.fingerprint
        else:
            same = (weight is self._seen[0] and version_of(weight) == self._seen[1]) or self._unchanged(weight)
        if same and (not told_after or self.fingerprint is None):
            self._seen, self.fingerprint = None, None
        elif same:
            self._is_converted = True

    def converted(self, site: Adapter, weight: torch.Tensor | None) -> None:
        """After that."""
        if self._is_converted and weight is not None and not weight.is_meta:
            if self._dtype != weight.dtype:
                self.fingerprint = None
            self.adopt(site, weight)
        self._is_converted = False

    def _unchanged(self, weight: torch.Tensor) -> bool:
        """Whether nothing has written to the weight since it was seen, as far as versions and addresses tell."""
        if self._seen is None:
            return False
        seen, version, address = self._seen
        if version_of(weight) != version or address_of(weight) != address:
            return False
        return weight is seen or (address != 0 and _alike(weight, seen))  # as a detached one that is put in its place

    def _find_out_whether_trained(self, site: Adapter) -> None:
        found = site.base_weight.fingerprint()
        if self.fingerprint is None:
            self.trained |= why_not_of(site.base_weight.matrix(), site.factors, site.variant) is not None
        else:
            self.trained |= found != self.fingerprint
        self.fingerprint = found

    def _compare(self, site: Adapter, *, written: bool) -> None:
        """The weight, the factors, or both were written: they have to belong together."""
        found = None
        if self.fingerprint is not None:
            found = site.base_weight.fingerprint()
            if found == self.fingerprint and (self.trained or not written):
                return
        why: str | None = "its values are others"
        if written or self.fingerprint is None:
            why = None if self.trained and not written else why_not_of(_matrix(site), site.factors, site.variant)
        if why is not None:
            raise SurgeryError(
                f"site {site.key!r}: its base weight is not the one that its factors were made for: {why} (expected "
                f"{self.fingerprint or 'a cast of that one'}, found {found or 'another'}). Load the weight that was "
                "there; or call undo_surgery and then apply_surgery on the new one; or recalibrate(model, reset=True)"
            )
        self.fingerprint, self.trained = found, self.trained and not written


def _matrix(site: Adapter) -> torch.Tensor:
    return site.base_weight.matrix().detach()


def _alike(weight: torch.Tensor, seen: torch.Tensor) -> bool:
    return weight.shape == seen.shape and weight.dtype == seen.dtype and weight.stride() == seen.stride()


def _versions(site: Adapter) -> Versions:
    return [(t, version_of(t)) for t in site.factors._buffers.values() if t is not None]


def _same(one: Versions, other: Versions) -> bool:
    return len(one) == len(other) and all(a is b and v == w for (a, v), (b, w) in zip(one, other, strict=True))
