"""Time contenders against each other: they take turns in one process, and ratios are of pairs of neighbours."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from surgery.planning.lowering_autotune import now

Run = Callable[[], Any]
CPU = torch.device("cpu")


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Let the collections before each run look only at what is made from here on, and not at all that was imported."""
    frozen = gc.get_freeze_count()
    if not frozen:  # else it is another's
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


@settled()
def paired(contenders: dict[str, Run], repeats: int, device: torch.device = CPU) -> dict[str, list[list[float]]]:
    """Milliseconds of each contender and of the base next to it, after two runs of each.

    Every contender has runs of the base of its own, before it and after it in turn, and the order of the contenders is
    turned round each time, so that load, clock and caches treat both alike. What a contender returns, if it can be
    called, is called after the clock has stopped.
    """
    base = contenders["base"]
    times: dict[str, list[list[float]]] = {name: [] for name in contenders if name != "base"}
    names = list(times)
    for i in range(repeats + 2):
        for name in names if i % 2 else reversed(names):
            pair = [contenders[name], base]
            found = [milliseconds(run, device) for run in (pair if i % 2 else reversed(pair))]
            if i > 1:
                times[name].append(found if i % 2 else found[::-1])
    return times


@settled()
def alternate(contenders: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each contender, taken in turn after one run that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(repeats + 1):
        for name, run in contenders.items():
            found = milliseconds(run)
            if i:
                times[name].append(found)
    return times


def milliseconds(run: Run, device: torch.device = CPU) -> float:
    """Duration of one run, until the device has done all of it."""
    gc.collect()
    started = now(device)
    after = run()
    found = 1000 * (now(device) - started)
    if callable(after):
        after()
    return found


def quartiles(pairs: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of paired ratios."""
    ratios = [a / b for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return low, middle, high


def power(x: Sequence[float], y: Sequence[float]) -> tuple[float, float | None]:
    """Exponent of the power law of least squares in logarithms, and its standard error (None of two points)."""
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    mean_u, mean_v = statistics.fmean(u), statistics.fmean(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    slope = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread
    left = sum((b - mean_v - slope * (a - mean_u)) ** 2 for a, b in zip(u, v, strict=True))
    return slope, math.sqrt(left / (len(u) - 2) / spread) if len(u) > 2 else None
