"""Runs of the speed matrix, and how they are timed beside the base."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.timing import Run, milliseconds, paired, quartiles, settled

SAMPLE_MS = 5.0  # a sample is at least so long: short runs are repeated in it
MOST_LOOPS = 200
LEAST = 5  # pairs


@settled()
def timed(run: Run, base: Run, repeats: int, seconds: float, device: torch.device) -> dict[str, Any]:
    """Medians and quartiles of a contender, of the base beside it, and of their paired ratios.

    Args:
        repeats: pairs at most.
        seconds: that the pairs may take, if that leaves enough of them.
    """
    one = statistics.median(milliseconds(base, device) for _ in range(3))
    loops = min(MOST_LOOPS, max(1, math.ceil(SAMPLE_MS / one)))
    pair = milliseconds(repeated(run, loops), device) + one * loops
    pairs = int(min(repeats, max(LEAST, 1000 * seconds / pair)))
    sampled = paired({"base": repeated(base, loops), "it": repeated(run, loops)}, pairs, device)["it"]
    mine, its = ([pair[i] / loops for pair in sampled] for i in (0, 1))
    low, middle, high = quartiles(sampled)
    ratio = {"q1": low, "median": middle, "q3": high, "n": len(sampled)}
    return {"milliseconds": spread(mine), "base_milliseconds": spread(its), "ratio": ratio, "loops": loops}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles of some samples."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"q1": low, "median": middle, "q3": high, "n": len(values)}


def repeated(run: Run, loops: int) -> Run:
    """The same run so many times."""

    def runs() -> None:
        for _ in range(loops):
            run()

    return runs


def run_of(call: Any, x: Tensor, trained: Mapping[str, nn.Parameter], *, training: bool) -> Run:
    """What is timed: a forward without gradients, or a step with its backward and the optimiser's.

    The backward goes to the input too, as in the middle of a model, so that the frozen base has one.
    """
    if not training:

        def forward() -> None:
            with torch.no_grad():
                call(x)

        return forward
    x = x.detach().clone().requires_grad_()
    parameters = list(trained.values())
    optimiser = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0) if parameters else None
    gradient: list[Tensor] = []

    def step() -> None:
        x.grad = None
        y = call(x)
        if not gradient:
            gradient.append(cotangent(y))
        y.backward(gradient[0])
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return step


def cotangent(y: Tensor) -> Tensor:
    """A gradient of the output, the same for all contenders of a shape."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
