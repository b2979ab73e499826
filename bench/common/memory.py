"""What is held and what is needed at most: bytes of an operated model's own tensors, and peaks of a process.

On an accelerator a peak is that of its allocator. On the CPU it is the resident memory of the whole process, tensors
included, so that a process can measure one thing only. Both are given above what was held when measuring began.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery import sites

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Peaks of memory above what is held when this is made, in bytes.

    Attributes:
        how: what is read, in words.
        peaks: by name; None on a device that does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int | None] = {}
        if device.type != "cpu":
            self.how = f"peak of the {device.type} allocator above the loaded model"
        elif _can_reset():
            self.how = "peak resident memory of a process of its own, above what it held with the model loaded"
        else:
            self.how = "highest resident memory of a process of its own so far, above that with the model loaded"
        _settle(device)
        self.held = _peak(device)

    @contextlib.contextmanager
    def peak(self, name: str) -> Iterator[None]:
        """Note the peak of what runs inside, also if it fails."""
        _settle(self.device)
        try:
            yield
        finally:
            found = _peak(self.device)
            self.peaks[name] = None if found is None or self.held is None else max(0, found - self.held)


def _settle(device: torch.device) -> None:
    """Let go of what is free, and let peaks begin anew."""
    gc.collect()
    if device.type == "cpu":
        with contextlib.suppress(AttributeError, OSError):  # only the GNU C library has it
            ctypes.CDLL(None).malloc_trim(0)
        if _can_reset():
            RESET.write_text("5")
    elif hasattr(torch.get_device_module(device), "reset_peak_memory_stats"):
        torch.get_device_module(device).reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    """Bytes at most since the last settling."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return module.max_memory_allocated(device) if hasattr(module, "max_memory_allocated") else None
    if _can_reset():
        found = re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
        assert found is not None
        return 1024 * int(found.group(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@functools.cache
def _can_reset() -> bool:
    """Whether the kernel lets a process begin a new peak: then each part of a run has its own."""
    try:
        RESET.write_text("5")
        return "VmHWM" in STATUS.read_text()
    except OSError:
        return False


def held_by(model: nn.Module) -> dict[str, int]:
    """Bytes that a model holds for its adapters: factors, cores, and what sites keep between forwards."""
    found, seen = {"factors": 0, "core": 0, "kept": 0}, set()

    def add(name: str, tensors: Any) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if (storage.device, storage.data_ptr()) not in seen:
                seen.add((storage.device, storage.data_ptr()))
                found[name] += storage.nbytes()

    for site in sites(model).values():
        core = site.core
        add("factors", site.factors.buffers())
        add("core", [*core.parameters(), *core.buffers()])
        for cached in site.cache.values():
            add("kept", [cached] if isinstance(cached, torch.Tensor) else vars(cached).values())
    return found
