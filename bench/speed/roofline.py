"""About the least time of a run: its matrix products at the rate of this machine, its tensors at its bandwidth.

Bytes are a lower bound: every tensor that is there before the run counts once (weights, factors, the input), and the
output once. FLOPs are those of matrix products and attention; a solve, as PSOFT has it, is not counted. Attention
counts in full, although a causal kernel may skip half of it: so the least time is an estimate, and no strict bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.common.paired_timing import repeated
from bench.common.runs import products
from bench.common.timing import Run, milliseconds, settled
from bench.models.decoder import Sizes
from passes.ir.torch_internals import TorchDispatchMode, tree_iter

SAMPLE_MS = 20.0  # of a sample at least: beside it, launching and waiting once take next to nothing
MOST_LOOPS = 2**16
LARGE = {"cpu": 2**27}  # bytes of what is moved, beyond a cache: 128 MiB, or 1 GiB on an accelerator


class Reads(TorchDispatchMode):
    """Bytes of the tensors that a run reads and has not made itself, each storage once, as far as it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, int] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = func.is_view if hasattr(func, "is_view") else False
        for tensor in () if views else tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor) and self._key(tensor) not in self.made:
                key = self._key(tensor)
                self.read[key] = max(self.read.get(key, 0), tensor.nbytes)
        out = func(*args, **(kwargs or {}))
        if not views:
            self.made |= {self._key(t) for t in tree_iter(out) if isinstance(t, Tensor)} - set(self.read)
        return out

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()


def work(run: Run, output: Tensor, device: torch.device) -> dict[str, int]:
    """FLOPs and bytes of one run, once it has run before: what it keeps is there by then."""
    after = run()
    if callable(after):
        after()
    with Reads() as mode:
        run()
    return {"flops": products(run, device), "bytes": sum(mode.read.values()) + output.nbytes}


@settled()
def ceilings(
    sizes: Sizes,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 5,
    *,
    multiply: Callable[[Tensor, Tensor], Any] = torch.mm,
    time: Callable[[Run, torch.device], float] = milliseconds,
) -> dict[str, float]:
    """Measured FLOPs per second of products of the model's sizes, and bytes per second of memory; the best of some.

    The products are those of the MLP and of the head, as much of it as memory allows; memory is copied, and only read,
    as most runs do with most of it.

    Args:
        repeats: samples of each, after a first one.
        multiply: a product of two matrices.
        time: milliseconds of a run on a device, until it is done.
    """
    limit = LARGE.get(device.type, 2**30)
    rates = []
    columns = min(sizes.vocabulary, limit // ((tokens + sizes.hidden) * dtype.itemsize))
    for wide in filter(None, (sizes.mlp, columns)):
        a = torch.randn(tokens, sizes.hidden, device=device, dtype=dtype)
        b = torch.randn(sizes.hidden, wide, device=device, dtype=dtype)
        seconds = _seconds(lambda a=a, b=b: multiply(a, b), device, repeats, time)  # type: ignore[misc]
        rates.append(2 * tokens * sizes.hidden * wide / seconds)
    large = torch.ones(limit // 4, device=device)
    copy = torch.empty_like(large)
    moved = 2 * large.nbytes / _seconds(lambda: copy.copy_(large), device, repeats, time)
    read = large.nbytes / _seconds(large.sum, device, repeats, time)
    return {"flops_per_second": max(rates), "bytes_per_second": max(moved, read)}


def _seconds(run: Run, device: torch.device, repeats: int, time: Callable[[Run, torch.device], float]) -> float:
    """Of one run, from the fastest of samples that hold so many of them that starting a sample hardly counts."""
    loops = 1
    time(repeated(run, loops), device)  # the first run of a kind may load its kernel
    while loops < MOST_LOOPS and min(time(repeated(run, loops), device) for _ in range(2)) < SAMPLE_MS:
        loops *= 2
    return min(time(repeated(run, loops), device) for _ in range(repeats)) / 1000 / loops


def minimum_ms(counted: dict[str, int], machine: dict[str, float]) -> float:
    """The longer of the two: about the least time, since a kernel may skip some of the FLOPs that are counted."""
    seconds = counted["flops"] / machine["flops_per_second"], counted["bytes"] / machine["bytes_per_second"]
    return 1000 * max(seconds)
