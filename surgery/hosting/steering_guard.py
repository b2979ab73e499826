"""Who steers a model: one thread or task at a time, since ``coeff`` is a tensor of the model that all who run it read.

Compiled code and graphs read that tensor too, so that a value per thread would hold in some forwards and not in others.
What differs between the rows of a batch needs no threads: ``coeff`` may be a tensor (batch,).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

from passes.errors import SurgeryError
from surgery.modules.steering import Steering

_LOCK = threading.Lock()
_BLOCKS: weakref.WeakKeyDictionary[Steering, list[object]] = (
    weakref.WeakKeyDictionary()
)  # those that are open, in order
_OWN: ContextVar[tuple[object, ...]] = ContextVar("_OWN", default=())  # those that this thread or task is within


@contextlib.contextmanager
def steering(found: Sequence[Steering]) -> Iterator[None]:
    """Keep others from setting coefficients; blocks of one thread or task may be nested.

    Raises:
        SurgeryError: another thread or task steers one of them.
    """
    block = object()  # surgery may end within it
    try:
        with _LOCK:
            for one in found:
                _check(one)
            for one in found:
                _BLOCKS.setdefault(one, []).append(block)
        _OWN.set((*_OWN.get(), block))
        yield
    finally:  # also of what an interrupt has left half done
        _OWN.set(tuple(other for other in _OWN.get() if other is not block))
        with _LOCK:
            for one in found:
                blocks = _BLOCKS.get(one, [])
                if block in blocks:
                    blocks.remove(block)


def check_steering(one: Steering) -> None:
    """Refuse to set a coefficient that another thread or task has set for the length of a block.

    Raises:
        SurgeryError: it has.
    """
    with _LOCK:
        _check(one)


def _check(one: Steering) -> None:
    blocks = _BLOCKS.get(one)
    if blocks and blocks[-1] not in _OWN.get():
        root = one.root() if one.root is not None else None
        raise SurgeryError(
            f"this {type(root).__name__} is being steered by another thread or task, and all who run it read one "
            "coeff: take turns, give each thread a copy.deepcopy of the model, or steer the rows of one batch with a "
            "tensor (batch,)"
        )
