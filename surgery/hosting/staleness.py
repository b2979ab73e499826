"""Find out whether anything that lowerings derive from was written to, once per call of the root.

Identity and version of all cores and frozen tensors are compared in one pass over flat lists, since in each forward an
attribute of a module costs a microsecond. Fused optimisers bump no version: every step of any optimiser counts as a
write, by a hook of the process.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from surgery.modules.adapter import Adapter
from surgery.modules.steering import Steering
from surgery.support.change_detection import version_of
from surgery.support.untrusted_files import JsonObject

_STEPS = [0]  # of all optimisers of the process
_HOOKED = [False]


def _count(*_: object) -> None:
    _STEPS[0] += 1


class Staleness:
    """Watches the adapters of one root."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Take all for stale, and look the adapters up again."""
        self.sites: JsonObject | None = None
        self.tables: list[Mapping[str, torch.Tensor | None]] = []
        self.nested: list[Any] = []
        self.tensors: list[torch.Tensor] = []
        self.versions: list[int] = []
        self.steps = -1
        self.coeff: torch.Tensor | None = None
        self.coeff_version = -1
        self.value: float | None = None

    def watch(self, sites: dict[str, Adapter], steering: Steering) -> None:
        """Watch these adapters, by the keys of their sites, and their coefficient."""
        if not _HOOKED[0]:
            _HOOKED[0] = True
            register_optimizer_step_post_hook(_count)
        self.forget()
        self.sites, self.steering = sites, steering
        for site in sites.values():
            core, factors = site.core, site.factors
            self.tables += [core._parameters, core._buffers, factors._buffers]
            if not site.host.inlined:  # a graph reads its weights by itself
                self.tables.append(site.host.table())
            self.nested += [core] if core._modules else []  # parametrised

    def check(self) -> None:
        """Drop what the sites have cached if anything was written to since the last check."""
        assert self.sites is not None
        now: list[torch.Tensor] = [t for table in self.tables for t in table.values() if t is not None]
        for core in self.nested:
            now += [*core.parameters(), *core.buffers()]
        self._check_coefficient()
        versions = _versions(now)
        steps = _STEPS[0]
        if (
            steps == self.steps
            and versions == self.versions
            and len(now) == len(self.tensors)
            and all(map(operator.is_, now, self.tensors))
        ):
            return
        self.tensors, self.versions, self.steps = now, versions, steps
        for site in self.sites.values():
            site.forget()

    def _check_coefficient(self) -> None:
        """Drop what was derived from another coefficient; what follows from the core alone stays."""
        coeff = self.steering.coeff
        if coeff.dim():
            return  # nothing is derived from the coefficients of rows and tokens
        self.steering.write_back()
        version = version_of(coeff)
        if coeff is self.coeff and version == self.coeff_version:
            return
        value = float(coeff) if coeff.device.type == "cpu" else None  # elsewhere, reading it would synchronise
        if value is None or value != self.value:
            for site in (self.sites or {}).values():
                site.cache.clear(steered=True)
        self.coeff, self.coeff_version, self.value = coeff, version, value

    def __deepcopy__(self, memo: dict[int, object]) -> Staleness:
        return Staleness()

    def __reduce__(self) -> tuple[object, ...]:
        return Staleness, ()


def _versions(tensors: list[torch.Tensor]) -> list[int]:
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # tensors of inference mode have none
        return [version_of(t) for t in tensors]
