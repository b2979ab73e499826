"""Find out whether anything that sites rely on was written to, once per call of the root.

Identity, version and address of cores, frozen factors and base weights are compared in one pass over flat lists, since
in each forward an attribute of a module costs a microsecond. Fused optimisers bump no version: every step of any
optimiser counts as a write to the cores, by a hook of the process. ``vector_to_parameters`` bumps none either, and
moves parameters to other memory.

What was compared also tells whether a core is still that of a forward, when the forward is recomputed in backward.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Collection, Mapping, Sequence
from itertools import chain

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from passes.ir.torch_internals import REPLICA, backward_task
from surgery.modules.adapter import Adapter
from surgery.modules.core import Core
from surgery.modules.steering import Steering
from surgery.support.change_detection import address_of, version_of
from surgery.support.untrusted_files import JsonObject

_STEPS = [0]  # of all optimisers of the process
_HOOKED = [False]
Table = JsonObject


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
    """Watches the adapters of one root.

    Attributes:
        offloaded: cores and factors whose tensors accelerate has put elsewhere, on the CPU or the disk.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Take all for stale, and look the adapters up again."""
        self.sites: dict[str, Adapter] | None = None
        self.tables: list[Table] = []
        self.nested: list[Core] = []
        self.places: list[tuple[Mapping[str, torch.Tensor | None], str]] = []
        self.factors: list[Table] = []
        self.cores, self.weights, self.frozen = _Seen(), _Seen(), _Seen()
        self.flags: list[bool] = []
        self.offloaded: list[nn.Module] = []
        self.steps = -1
        self.coeff: torch.Tensor | None = None
        self.coeff_version = -1
        self.value: float | None = None
        self._snapshot: CoreSnapshot | None = None

    def watch(self, sites: dict[str, Adapter], steering: Steering) -> None:
        """Watch these adapters, by the keys of their sites, and their coefficient."""
        if not _HOOKED[0]:
            _HOOKED[0] = True
            register_optimizer_step_post_hook(_count)
        self.forget()
        self.sites, self.steering = sites, steering
        for site in sites.values():
            core = site.core
            self.tables += [core._parameters, core._buffers]
            self.nested += [core] if core._modules else []  # parametrised
            self.factors.append(site.factors._buffers)
            if not site.host.inlined:  # a graph has no call that would check, and one form
                self.places.append(site.host.place())

    def check(self) -> None:
        """Drop what the sites have cached if anything was written to since the last check.

        Raises:
            SurgeryError: the base weight of a site is another one than its factors were made for.
        """
        assert self.sites is not None
        cores: list[torch.Tensor] = [t for t in chain.from_iterable(map(dict.values, self.tables)) if t is not None]
        for core in self.nested:
            cores += [*core.parameters(), *core.buffers()]
        held = (table.get(name) for table, name in self.places)
        weights = [t for t in held if t is not None]
        factors: list[torch.Tensor] = [*chain.from_iterable(map(dict.values, self.factors))]
        flags = [t.requires_grad for t in weights]
        self._check_coefficient()
        moved = flags != self.flags or not self.weights.same(weights) or not self.frozen.same(factors)
        if moved:
            self._settle()
        if moved or _STEPS[0] != self.steps or not self.cores.same(cores):
            self._snapshot = None
            for site in self.sites.values():
                site.forget()
            parts = [part for site in self.sites.values() for part in (site.core, site.factors)]
            self.offloaded = [part for part in parts if any(t.is_meta for t in (*part.parameters(), *part.buffers()))]
            self.cores, self.steps = _Seen(cores, hold=True), _STEPS[0]
            self.weights, self.frozen, self.flags = _Seen(weights), _Seen(factors, addresses=False), flags

    def snapshot(self) -> CoreSnapshot:
        """What was found at the last check."""
        if self._snapshot is None:
            self._snapshot = CoreSnapshot([site.core for site in (self.sites or {}).values()], self.steps)
        return self._snapshot

    def _settle(self) -> None:
        for site in (self.sites or {}).values():
            if not site.host.inlined:
                site.record.settle(site, site.host.registered())

    def _check_coefficient(self) -> None:
        """Drop what was derived from another coefficient; what follows from the core alone stays."""
        self.steering.write_back()
        coeff = self.steering.coeff
        if coeff.dim():
            return  # nothing is derived from the coefficients of rows and tokens
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


class _Seen:
    """Tensors as they were at the last check.

    Args:
        addresses: whether they may be moved to other memory without a write that counts.
        hold: keep that memory, so that nothing that comes in their place can have the same address.
    """

    def __init__(self, tensors: Sequence[torch.Tensor] = (), *, addresses: bool = True, hold: bool = False) -> None:
        self.tensors, self.versions = tensors, _versions(tensors)
        self.addresses = _addresses(tensors) if addresses else None
        self.held = [t.detach() for t in tensors] if hold else []

    def same(self, now: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors, and nothing has written to them."""
        return (
            len(now) == len(self.tensors)
            and all(map(operator.is_, now, self.tensors))
            and _versions(now) == self.versions
            and (self.addresses is None or _addresses(now) == self.addresses)
        )


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # tensors of inference mode have none
        return [version_of(t) for t in tensors]


def _addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    try:
        return list(map(torch.Tensor.data_ptr, tensors))
    except RuntimeError:  # some tensor subclasses have no memory of their own
        return [address_of(t) for t in tensors]
