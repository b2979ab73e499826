"""Weights and data that are hard on floating point: finite factors that keep their promises, or a typed error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from passes.errors import SurgeryError
from surgery import Contrast, SSpaceLinear, apply_surgery, set_coeff, sites, undo_surgery
from surgery.errors import WeightError
from surgery.modules.adapter import rebuilt, remainder
from surgery.variants import Variant
from tests.contracts.test_variants import VARIANTS
from tests.support.reference import array
from tests.support.tolerance import ROUNDED

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


def operated(W: torch.Tensor, variant: Variant, data: Any = None, **options: Any) -> tuple[nn.Module, SSpaceLinear]:
    options = {"r": 5, "target_modules": "all-linear", "progress": False} | options
    model = apply_surgery(model_of(W), variant, calibration=data, **options)
    return model, sites(model)["0"]


def check_factors(site: SSpaceLinear, variant: Variant) -> None:
    """Finite, S descending, U orthonormal, and Vh too unless it is oblique; the split puts the weight back."""
    U, S, Vh = (torch.from_numpy(array(t)) for t in (site.factors.U, site.factors.S, site.factors.Vh))
    assert all(torch.isfinite(t).all() for t in (U, S, Vh, *site.core.tensors().values()))
    assert (S >= 0).all()
    assert (S.diff() <= 0).all()
    eye, limit = torch.eye(len(S), dtype=F64), 4 * ROUNDED[site.factors.U.dtype]
    assert (U.T @ U - eye).abs().max() <= limit
    if orthonormal(variant):
        assert (Vh @ Vh.T - eye).abs().max() <= limit
        W = torch.from_numpy(array(site.weight))
        top = torch.linalg.svdvals(W / W.abs().max().clamp(min=1e-300))[0] * W.abs().max()
        mismatch = (U.T @ W - S[:, None] * Vh).abs().max()
        assert mismatch <= limit * top + 4 * torch.finfo(S.dtype).tiny


def orthonormal(variant: Variant) -> bool:
    return not variant.name.endswith(("corda", "asvd")) and not getattr(variant, "cov_orient", False)


def check_identity(model: nn.Module, W: torch.Tensor, variant: Variant) -> None:
    """At coeff 0, and before training where the variant promises it, bit for bit the base; undone too."""
    x = some(3, W.shape[1], seed=9).to(W.dtype)
    base = model_of(W)
    coeffs = (1.0, 0.0) if variant.identity_at_init else (0.0,)
    for coeff in coeffs:
        set_coeff(model, coeff)
        with torch.no_grad():
            assert same_bits(model(x), base(x))
        assert same_bits(model(x), base.requires_grad_(False)(x))
    undo_surgery(model)
    assert same_bits(model[0].weight, W)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal, infinities and NaNs of the base's own included."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


@each_dtype
@each_weight
@each_variant
def test_factors_of_a_hard_weight(variant, name, dtype):
    W = weight_of(name, dtype)
    data = calibration(variant, DATA["normal"](W.shape[1]), dtype) if variant.needs_calibration else None
    try:
        model, site = operated(W, variant, data)
    except SurgeryError as error:
        refusal(error, variant, name, dtype)
        return
    check_factors(site, variant)
    check_split(site)
    check_identity(model, W, variant)


def refusal(error: SurgeryError, variant: Variant, name: str, dtype: torch.dtype) -> None:
    """Only where singular values are out of the dtype's range, or there is no direction; the message says where."""
    assert "site '0'" in str(error), error
    W = weight_of(name, dtype).double()
    largest = W.abs().max()
    if isinstance(error, WeightError):
        assert "overflow" in str(error)
        assert "factors_dtype" in str(error) or dtype == F64
        assert not orthonormal(variant) or torch.linalg.svdvals(W / largest)[0] > torch.finfo(dtype).max / largest
        assert largest > torch.finfo(dtype).max / 100
    elif largest == 0:
        assert variant.name == "sspace"
        assert "weight is zero" in str(error)
    else:  # the products themselves overflow
        assert "second moment of its data overflows" in str(error)
        assert not torch.isfinite(DATA["normal"](W.shape[1]).to(wide(dtype)) @ W.to(wide(dtype)).T).all()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def check_split(site: SSpaceLinear) -> None:
    """``W_res + U S Vh`` is the weight, once it is rounded."""
    wide, dtype = site.weight.detach().double(), site.weight.dtype
    W_res = remainder(site)
    if torch.isfinite(W_res).all():
        error = (rebuilt(W_res, site, dtype).double() - wide).abs().max()
        subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert error <= 2 * torch.finfo(W_res.dtype).eps * wide.abs().max() + subnormal
    else:
        assert wide.abs().max() > torch.finfo(W_res.dtype).max / 2


@of_every("dtype", DTYPES, (torch.float32,), ids=str)
@of_every("data", DATA, ("of rank 1", "zero", "enormous"))
@pytest.mark.parametrize("name", ["condition 1e7", "rank 3", "zero", "one entry", "huge", "wide", "tall", "1 x 1"])
@each_variant
def test_factors_with_hard_data(variant, name, data, dtype):
    W = weight_of(name, dtype)
    X = DATA[data](W.shape[1])
    if dtype == torch.float16 and data in ("enormous", "huge"):
        X = X / X.abs().max() * 6e4
    try:
        model, site = operated(W, variant, calibration(variant, X, dtype), r=1)
    except SurgeryError as error:
        hard_data_refusal(error, variant, name, X.to(dtype), W)
        return
    check_factors(site, variant)
    check_split(site)
    check_identity(model, W, variant)


def hard_data_refusal(error: SurgeryError, variant: Variant, name: str, X: torch.Tensor, W: torch.Tensor) -> None:
    """Only where there is no direction, or the factors that data makes do not fit a half dtype."""
    assert "site '0'" in str(error)
    if isinstance(error, WeightError):
        assert "factor S overflows" in str(error) or not orthonormal(variant)
        assert "factors_dtype='float32'" in str(error)
        assert not orthonormal(variant) or name == "huge"
    else:
        assert variant.name == "sspace"
        assert not X.any() or not W.any(), error
