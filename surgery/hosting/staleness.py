"""Find out whether anything that lowerings derive from was written to, once per call of the root.

Identity and version of all cores and frozen tensors are compared in one pass over flat lists, since in each forward an
attribute of a module costs a microsecond. Fused optimisers bump no version: every step of any optimiser counts as a
write, by a hook of the process.

What was compared also tells whether a core is still that of a forward, when the forward is recomputed in backward.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from passes.ir.torch_internals import REPLICA, backward_task
from surgery.support.change_detection import version_of

_STEPS = [0]  # of all optimisers of the process
_HOOKED = [False]


class _Stepped:
    """The parameters of an optimiser, which may be gone, and when it stepped them last, by the count of all steps.

    Attributes:
        at: of steps outside of any backward; 0 for none.
        within: whether it ever stepped within a backward, where each core is stepped after its last use.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.parameters = [weakref.ref(p) for p in parameters]
        self.at, self.within = 0, False

    def ids(self) -> set[int]:
        return {id(p) for p in (ref() for ref in self.parameters) if p is not None}


_OPTIMISERS: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Stepped] = weakref.WeakKeyDictionary()
_STEPPED: list[_Stepped] = []


def _count(optimizer: torch.optim.Optimizer, *_: object) -> None:
    _STEPS[0] += 1
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = _OPTIMISERS.get(optimizer)
    if found is None or len(found.parameters) != len(parameters):
        _STEPPED[:] = [one for one in _STEPPED if one.ids()]
        found = _OPTIMISERS[optimizer] = _Stepped(parameters)
        _STEPPED.append(found)
    if backward_task() == -1:
        found.at = _STEPS[0]
    else:
        found.within = True


class CoreSnapshot:
    """Which parameters the cores of a root had at a call, and how often they had been written to."""

    def __init__(self, cores: list[nn.Module], steps: int) -> None:
        self.cores, self.steps = cores, steps
        self.versions = {id(p): (p, version_of(p)) for core in cores for p in core.parameters()}
        self.sharded = any(type(p) is not nn.Parameter for p, _ in self.versions.values())

    def changed(self, core: nn.Module | None) -> bool:
        """Whether a core was written to since, or replaced; of None, any but those that a backward itself steps."""
        if core is not None:
            return self._changed(core, self._stepped())
        within = {one for optimiser in _STEPPED if optimiser.within for one in optimiser.ids()}
        stepped = self._stepped() - within
        return any(self._changed(one, stepped, within) for one in self.cores)

    def _changed(self, core: nn.Module, stepped: set[int], excepted: Collection[int] = ()) -> bool:
        if vars(core).get(REPLICA):  # of nn.DataParallel
            return False
        for p in core.parameters():
            if type(p) is not nn.Parameter or id(p) in excepted:  # sharded: it is gathered anew for each forward
                continue
            known = self.versions.get(id(p))
            if known is None and not self.sharded:
                return True
            if known is not None and (known[1] != version_of(p) or id(p) in stepped):
                return True
        return False

    def _stepped(self) -> set[int]:
        """The parameters that optimisers have stepped since; fused ones count no write."""
        if _STEPS[0] == self.steps:
            return set()
        return {one for optimiser in _STEPPED if optimiser.at > self.steps for one in optimiser.ids()}


class Staleness:
    """Watches the adapters of one root."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Take all for stale, and look the adapters up again."""
        self.sites: dict[str, Any] | None = None
        self.tables: list[dict[str, torch.Tensor | None]] = []
        self.nested: list[Any] = []
        self.tensors: list[torch.Tensor] = []
        self.versions: list[int] = []
        self.steps = -1
        self.coeff: torch.Tensor | None = None
        self.coeff_version = -1
        self.value: float | None = None
        self._snapshot: CoreSnapshot | None = None

    def watch(self, sites: dict[str, Any], steering: Any) -> None:
        """Watch these adapters, by the keys of their sites, and their coefficient."""
        if not _HOOKED[0]:
            _HOOKED[0] = True
            register_optimizer_step_post_hook(_count)
        self.forget()
        self.sites, self.steering = sites, steering
        for site in sites.values():
            core, factors, owner = site.core, site.factors, site.host.owner
            self.tables += [core._parameters, core._buffers, factors._buffers]
            if site.host.name == "module":
                self.tables.append(owner._parameters)
            self.nested += [core] if core._modules else []  # parametrised

    def check(self) -> None:
        """Drop what the sites have cached if anything was written to since the last check."""
        assert self.sites is not None
        now: list[Any] = [t for table in self.tables for t in table.values() if t is not None]
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
        self.tensors, self.versions, self.steps, self._snapshot = now, versions, steps, None
        for site in self.sites.values():
            site.forget()

    def snapshot(self) -> CoreSnapshot:
        """What was found at the last check."""
        if self._snapshot is None:
            self._snapshot = CoreSnapshot([site.core for site in (self.sites or {}).values()], self.steps)
        return self._snapshot

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

    def __reduce__(self) -> Any:
        return Staleness, ()


def _versions(tensors: list[torch.Tensor]) -> list[int]:
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # tensors of inference mode have none
        return [version_of(t) for t in tensors]
