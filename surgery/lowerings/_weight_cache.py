"""What a lowering makes out of a site's tensors for inference, and keeps until one of them changes.

It is never stale. On the CPU the values of the core and of coeff are compared with those that it was made from, as
``.data`` may be written unnoticed; on an accelerator, where that would synchronise, version counters are, and
``surgery.refresh`` and ``eval()`` are for such writes there. Of the frozen tensors, identity and version are compared.

All this is asked in each forward, where an attribute of a module costs a microsecond and a generator another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from surgery.support.change_detection import watch

if TYPE_CHECKING:
    from surgery.modules.adapter import SSpaceLinear
    from surgery.modules.core import Core


class Kept:
    """A tensor and what it was made from."""

    def __init__(self, site: SSpaceLinear, make: Callable[[SSpaceLinear], torch.Tensor]) -> None:
        live, frozen = _sources(site)
        self.unchanged = [watch(tensor, by_value=True) for tensor in live]
        self.unchanged += [watch(tensor, by_value=False) for tensor in frozen]
        self.made = make(site)

    def fits(self, site: SSpaceLinear) -> bool:
        """Whether the tensor is what would be made now."""
        live, frozen = _sources(site)
        if len(live) + len(frozen) != len(self.unchanged):
            return False
        for same, tensor in zip(self.unchanged, (*live, *frozen), strict=True):  # noqa: SIM110
            if not same(tensor):
                return False
        return True


def _sources(site: SSpaceLinear) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The core and the knob, which are live, and the frozen tensors."""
    modules = site._modules
    core: Core = modules["core"]  # type: ignore[assignment]
    return core.state(), (site.weight, *modules["factors"]._buffers.values())  # type: ignore[union-attr, arg-type]


def kept(site: SSpaceLinear, name: str, make: Callable[[SSpaceLinear], torch.Tensor]) -> torch.Tensor:
    """What ``make(site)`` gives at the present core and coeff, made anew only if one of them has changed.

    A new tensor each time: a graph that autograd still holds may read the old one.

    Args:
        name: under which the site keeps it.
    """
    found = site._kept.get(name)
    if found is None or not found.fits(site):
        site._kept.pop(name, None)  # before there are two
        with torch.inference_mode(False):
            found = site._kept[name] = Kept(site, make)
    return found.made
