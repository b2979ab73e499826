"""Refuse to change a model that another thread is running: its forward would go on in a model of another kind."""

from __future__ import annotations

import sys
import threading
from types import FrameType

from torch import nn

from passes.errors import SurgeryError
from passes.ir.torch_internals import MODULE_CALLS


def check_idle(model: nn.Module) -> None:
    """Refuse a model that another thread is in a call of, by the frames of all threads.

    A call that begins later is not seen: nothing can stop it.

    Raises:
        SurgeryError: names the thread, and the module that it is in.
    """
    if threading.active_count() < 2:
        return
    paths: dict[int, str] = {}
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        called = [] if ident == threading.get_ident() else _called(frame)
        if called and not paths:
            paths = {id(module): path for path, module in model.named_modules()}
        inside = next((module for module in called if id(module) in paths), None)
        if inside is not None:
            where = f" (it is in {paths[id(inside)]!r})" if paths[id(inside)] else ""
            raise SurgeryError(
                f"thread {names.get(ident, ident)!r} is running this {type(model).__name__}{where}: a forward cannot "
                "go on while a model is changed; wait until it is done, or keep others from calling it with a lock"
            )


def _called(frame: FrameType | None) -> list[nn.Module]:
    """The modules that a thread is in a call of, the innermost first."""
    found = []
    while frame is not None:
        if frame.f_code in MODULE_CALLS or frame.f_code.co_name == "generate":
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                found.append(module)
        frame = frame.f_back
    return found
