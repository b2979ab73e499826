"""What a lowering derives from a site's tensors for inference, and reuses until one of them changes.

Whoever writes to a core marks it stale: the verbs, ``load_state_dict``, conversions, ``train()`` and ``eval()``,
every step of an optimiser. Other writes are found by version counters, which the root's call compares once, before any
site runs; what is cached is used within such a call only. A write that bumps no counter (``.data``, NumPy) needs
``surgery.refresh``.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from passes.ir.torch_internals import is_checkpointed_selectively
from surgery.support.untrusted_files import JsonObject

PREPARED = "prepared"
WEIGHT = "weight"  # of a site that is a weight which is read
COUNTER = itertools.count(1)
SITES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class WeightCache:
    """Derived tensors of one site by name.

    Attributes:
        handle: the number by which compiled code finds the site; a tensor, so that no graph holds its value.
    """

    def __init__(self, site: Any) -> None:
        number = next(COUNTER)
        self.handle = torch.tensor(number)
        self._site = weakref.ref(site)
        self._cached: JsonObject = {}
        SITES[number] = site

    def get(self, name: str, make: Callable[[Any], Any]) -> Any:
        """What ``make(site)`` gives at the present core and coeff; within a call of the root it is made once.

        A new tensor each time: a graph that autograd still holds may read the old one. In a recomputation it is made
        from the coefficient of its forward; and where selective checkpointing counts operations, both times.
        """
        site: Any = self._site()
        if not site.steering.armed or is_checkpointed_selectively() or site.steering.recall() is not None:
            return make(site)
        if name not in self._cached:
            with torch.inference_mode(False):
                self._cached[name] = make(site)
        return self._cached[name]

    def get_for(self, name: str, read: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What ``make(read)`` gives within a call of the root, as long as it is asked for the same tensor.

        It is handed out as a weight, which somebody may write to: then it is recomputed.
        """
        held = self._cached.get(name)
        if held is None or held[0] is not read or held[1]._version != held[2]:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(read.device.type, enabled=False):
                made = make(read)
            self._cached[name] = held = (read, made, made._version)
        return held[1]

    def clear(self, *, steered: bool = False) -> None:
        """Drop it all.

        Args:
            steered: only what depends on the coefficient, and so not what the variant prepares from its core.
        """
        kept = self._cached.get(PREPARED) if steered else None
        self._cached.clear()
        if kept is not None:
            self._cached[PREPARED] = kept

    def peek(self, name: str) -> Any:
        """What is cached under a name, or None."""
        return self._cached.get(name)

    def values(self) -> list[object]:
        """All that is cached."""
        return list(self._cached.values())

    def __contains__(self, name: str) -> bool:
        return name in self._cached

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the site makes one of its own

    def __reduce__(self) -> tuple[object, ...]:
        return type(None), ()
