"""Weights and data that are hard on floating point, and the variants that meet them in the fast lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from surgery import Contrast
from surgery.variants import Variant
from tests.support.variant_cases import VARIANTS

F64 = torch.float64
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FAST = [type(v)() for v in VARIANTS if v == type(v)()] + [v for v in VARIANTS if getattr(v, "cov_orient", False)]


def of_every(name: str, values: Any, fast: Any, **options: Any) -> Any:
    """All values, of which some run in the full lane only."""
    return pytest.mark.parametrize(
        name, [v if v in fast else pytest.param(v, marks=pytest.mark.full) for v in values], **options
    )


each_dtype = of_every("dtype", DTYPES, (torch.float32, torch.float16), ids=lambda d: str(d).removeprefix("torch."))
each_variant = of_every("variant", VARIANTS, FAST, ids=lambda v: f"{v.name}-{VARIANTS.index(v)}")


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def conditioned(exponent: float, rows: int = 12, columns: int = 10) -> torch.Tensor:
    U, V = (torch.linalg.qr(some(n, min(rows, columns), seed=n))[0] for n in (rows, columns))
    return U * torch.logspace(0, -exponent, min(rows, columns), dtype=F64) @ V.T


def one_entry(value: float) -> torch.Tensor:
    W = torch.zeros(6, 9, dtype=F64)
    W[4, 2] = value
    return W


WEIGHTS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "condition 1e3": lambda d: conditioned(3),
    "condition 1e7": lambda d: conditioned(7),
    "condition 1e10": lambda d: conditioned(10, 10, 12),
    "condition 1e14": lambda d: conditioned(14),
    "rank 1": lambda d: torch.outer(some(8), some(11, seed=1)),
    "rank 3": lambda d: some(12, 3) @ some(3, 8, seed=1),
    "integers of rank 2": lambda d: torch.arange(63.0, dtype=F64).reshape(7, 9),
    "zero": lambda d: torch.zeros(6, 9, dtype=F64),
    "one entry": lambda d: one_entry(-2.0),
    "one tiny entry": lambda d: one_entry(torch.finfo(d).smallest_normal),
    "one subnormal entry": lambda d: one_entry(torch.finfo(d).smallest_normal * torch.finfo(d).eps),
    "one huge entry": lambda d: one_entry(torch.finfo(d).max),
    "identity": lambda d: torch.eye(9, dtype=F64),
    "orthogonal": lambda d: torch.linalg.qr(some(8, 8))[0],
    "half an identity": lambda d: torch.eye(5, 12, dtype=F64),
    "ones": lambda d: torch.ones(6, 7, dtype=F64),
    "tiny": lambda d: some(8, 6) * (1e-30 if d != torch.float16 else 1e-4),
    "subnormal": lambda d: some(8, 6) * torch.finfo(d).smallest_normal / 4,
    "huge": lambda d: some(8, 6).clamp(-3, 3) * (1e30 if d != torch.float16 else 5e3),
    "top of the range": lambda d: some(8, 6).sign() * torch.finfo(d).max * 0.99,
    "one huge row": lambda d: torch.cat([some(1, 9) * (1e20 if d != torch.float16 else 1e4), some(6, 9) * 1e-3]),
    "1 x n": lambda d: some(1, 300),
    "n x 1": lambda d: some(300, 1),
    "1 x 1": lambda d: some(1, 1),
    "wide": lambda d: some(3, 400),
    "tall": lambda d: some(400, 3),
}
each_weight = pytest.mark.parametrize("name", WEIGHTS)

DATA: dict[str, Callable[[int], torch.Tensor]] = {
    "normal": lambda n: some(40, n, seed=3),
    "of rank 1": lambda n: torch.outer(some(40, seed=4), some(n, seed=5)),
    "zero": lambda n: torch.zeros(40, n, dtype=F64),
    "one token": lambda n: some(1, n, seed=6),
    "huge": lambda n: some(40, n, seed=7) * 1e4,
    "enormous": lambda n: some(40, n, seed=7) * 1e30,
    "tiny": lambda n: some(40, n, seed=8) * 1e-7,
    "vanishing": lambda n: some(40, n, seed=8) * 1e-35,
}


def weight_of(name: str, dtype: torch.dtype) -> torch.Tensor:
    W = WEIGHTS[name](dtype).to(dtype)
    assert torch.isfinite(W).all()
    return W


def model_of(W: torch.Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype))
    model[0].weight = nn.Parameter(W.clone())
    return model


def calibration(variant: Variant, X: torch.Tensor, dtype: torch.dtype) -> Any:
    X = X.to(dtype)
    if variant.statistic == "contrast":
        return Contrast([X], [X * -0.5], pool="all")
    return [X]
