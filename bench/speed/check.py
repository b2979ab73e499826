"""Whether a contender computes what it should, in the runtime that it is about to be timed in.

An error is a root mean square over that of the adapter's own effect: 1 is an adapter that does nothing. A tolerance on
the output alone would pass a contender whose adapter was dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.paired_timing import cotangent

LIMIT = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class Answer:
    """Output, and of a training step the gradients of the input and of what is trained."""

    output: Tensor
    of_input: Tensor | None = None
    of_trained: Mapping[str, Tensor] | None = None


def answer(call: Callable[[Tensor], Any], x: Tensor, trained: Mapping[str, nn.Parameter], *, training: bool) -> Answer:
    """What a contender gives for an input; in training also the gradients, from a fixed one of the output."""
    if not training:
        with torch.no_grad():
            return Answer(call(x).detach().clone())
    x = x.detach().clone().requires_grad_()
    for p in trained.values():
        p.grad = None
    y = call(x)
    y.backward(cotangent(y))
    assert x.grad is not None
    found = {}
    for (
        name,
        p,
    ) in trained.items():  # what a backward does not reach has no gradient: that is an error, and shows as one
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        p.grad = None
    return Answer(y.detach().clone(), x.grad, found)


def errors(found: Answer, reference: Answer, base: Answer, effective: bool = True) -> dict[str, float]:
    """Errors of the output and of the gradients.

    Args:
        reference: in higher precision.
        base: of the plain base, in higher precision.
        effective: False for the base itself, whose errors are over the output.
    """
    result = {"output": _over(found.output, reference.output, base.output if effective else None)}
    if found.of_input is not None and reference.of_input is not None:
        result["gradient of the input"] = _over(
            found.of_input, reference.of_input, base.of_input if effective else None
        )
    if found.of_trained and reference.of_trained is not None:
        if set(found.of_trained) != set(reference.of_trained):
            return result | {"gradient of the adapter": float("inf")}
        mine, its = (torch.cat([a[n].flatten().double() for n in sorted(a)])
                     for a in (found.of_trained, reference.of_trained))  # fmt: skip
        result["gradient of the adapter"] = float((mine - its).norm() / its.norm())
    return result


def _over(found: Tensor, reference: Tensor, base: Tensor | None) -> float:
    if found.shape != reference.shape:
        return float("inf")
    effect = reference if base is None else reference - base
    return float((found.to(reference) - reference).norm() / effect.norm())
