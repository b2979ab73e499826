"""Who steers a model: one thread or task at a time, since ``coeff`` is a tensor of the model that all who run it read.

Compiled code and graphs read that tensor too, so that a value per thread would hold in some forwards and not in others.
What differs between the rows of a batch needs no threads: ``coeff`` may be a tensor (batch,).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

from passes.errors import SurgeryError
from surgery.modules.adapter import SSpaceLinear
from surgery.modules.core import Core

_LOCK = threading.Lock()
_BLOCKS: weakref.WeakKeyDictionary[Core, list[object]] = weakref.WeakKeyDictionary()  # those that are open, in order
_OWN: ContextVar[tuple[object, ...]] = ContextVar("_OWN", default=())  # those that this thread or task is within


@contextlib.contextmanager
def steering(found: Mapping[str, SSpaceLinear]) -> Iterator[None]:
    """Keep others from setting the coefficient of sites; blocks of one thread or task may be nested.

    Raises:
        SurgeryError: another thread or task steers one of them.
    """
    block, cores = object(), [site.core for site in found.values()]  # surgery may end within the block
    try:
        with _LOCK:
            _check(found)
            for core in cores:
                _BLOCKS.setdefault(core, []).append(block)
        _OWN.set((*_OWN.get(), block))
        yield
    finally:  # also of what an interrupt has left half done
        _OWN.set(tuple(other for other in _OWN.get() if other is not block))
        with _LOCK:
            for core in cores:
                blocks = _BLOCKS.get(core, [])
                if block in blocks:
                    blocks.remove(block)


def check_steering(found: Mapping[str, SSpaceLinear]) -> None:
    """Refuse to set a coefficient that another thread or task has set for the length of a block.

    Raises:
        SurgeryError: it has.
    """
    with _LOCK:
        _check(found)


def _check(found: Mapping[str, SSpaceLinear]) -> None:
    own = _OWN.get()
    for key, site in found.items():
        blocks = _BLOCKS.get(site.core)
        if blocks and blocks[-1] not in own:
            raise SurgeryError(
                f"site {key!r} is being steered by another thread or task, and all who run the model read one coeff: "
                "take turns, give each thread a copy.deepcopy of the model, or steer the rows of one batch with a "
                "tensor (batch,)"
            )
