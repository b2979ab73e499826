"""What a run cannot be faster than: its matrix products at the rate of this machine, its tensors at its bandwidth.

Bytes are a lower bound: every tensor that is there before the run counts once (weights, factors, the input), and the
output once. FLOPs are those of matrix products and attention; a solve, as PSOFT has it, is not counted.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bench.runs import products
from bench.speed_model import Sizes
from bench.timing import Run, milliseconds


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


def ceilings(sizes: Sizes, tokens: int, device: torch.device, dtype: torch.dtype, repeats: int = 5) -> dict[str, float]:
    """Measured FLOPs per second of products of the model's sizes, and bytes per second of a copy; the best of some."""
    a = torch.randn(tokens, sizes.hidden, device=device, dtype=dtype)
    b = torch.randn(sizes.hidden, sizes.mlp, device=device, dtype=dtype)
    flops = 2 * tokens * sizes.hidden * sizes.mlp
    large = torch.ones((1 if device.type == "cpu" else 8) * 2**25, device=device)  # 128 MiB, beyond a cache; 1 GiB
    copy = torch.empty_like(large)
    gc.collect()
    loops = min(1000, max(1, int(2e9 // flops)))

    def multiply() -> None:
        for _ in range(loops):
            torch.mm(a, b)

    def move() -> None:
        copy.copy_(large)

    best = {}
    for name, run in (("multiply", multiply), ("move", move)):
        best[name] = min(milliseconds(run, device) for _ in range(repeats + 1)) / 1000
    rate, bandwidth = loops * flops / best["multiply"], 2 * large.nbytes / best["move"]
    return {"flops_per_second": rate, "bytes_per_second": bandwidth}


def minimum_ms(counted: dict[str, int], machine: dict[str, float]) -> float:
    """The longer of the two."""
    seconds = counted["flops"] / machine["flops_per_second"], counted["bytes"] / machine["bytes_per_second"]
    return 1000 * max(seconds)
