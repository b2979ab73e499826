"""Weights and data that are hard on floating point: finite factors that keep their promises, or a typed error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from passes.errors import SurgeryError
from surgery import Adapter, apply_surgery, set_coeff, sites, undo_surgery
from surgery.errors import WeightError
from surgery.modules.remainder import rebuilt, remainder
from surgery.variants import Variant
from tests.support.hard_weights import (
    DATA,
    DTYPES,
    F64,
    calibration,
    each_dtype,
    each_variant,
    each_weight,
    model_of,
    of_every,
    some,
    weight_of,
)
from tests.support.reference import array
from tests.support.tolerance import ROUNDED


def operated(W: torch.Tensor, variant: Variant, data: Any = None, **options: Any) -> tuple[nn.Module, Adapter]:
    options = {"r": 5, "target_modules": "all-linear", "progress": False} | options
    model = apply_surgery(model_of(W), variant, calibration=data, **options)
    return model, sites(model)["0"]


def check_factors(site: Adapter, variant: Variant) -> None:
    """Finite, S descending, U and Vh orthonormal as far as the basis says so; the split puts the weight back."""
    U, S, Vh = (torch.from_numpy(array(t)) for t in (site.factors.U, site.factors.S, site.factors.Vh))
    assert all(torch.isfinite(t).all() for t in (U, S, Vh, *site.core.tensors().values()))
    assert (S >= 0).all()
    assert (S.diff() <= 0).all()
    eye, limit = torch.eye(len(S), dtype=F64), 4 * ROUNDED[site.factors.U.dtype]
    if "orthonormal U" in variant.basis_config.gives:
        assert (U.T @ U - eye).abs().max() <= limit
    if orthonormal(variant):
        assert (Vh @ Vh.T - eye).abs().max() <= limit
        W = torch.from_numpy(array(site.weight))
        top = torch.linalg.svdvals(W / W.abs().max().clamp(min=1e-300))[0] * W.abs().max()
        mismatch = (U.T @ W - S[:, None] * Vh).abs().max()
        assert mismatch <= limit * top + 4 * torch.finfo(S.dtype).tiny


def orthonormal(variant: Variant) -> bool:
    return {"orthonormal U", "orthonormal Vh"} <= variant.basis_config.gives


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


@pytest.mark.matrix(2)
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
        assert "contrast data" in variant.basis_config.gives
        assert "weight is zero" in str(error)
    else:  # the products themselves overflow
        assert "second moment of its data overflows" in str(error)
        assert not torch.isfinite(DATA["normal"](W.shape[1]).to(wide(dtype)) @ W.to(wide(dtype)).T).all()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def check_split(site: Adapter) -> None:
    """``W_res + U S Vh`` is the weight, once it is rounded."""
    wide, dtype = site.weight.detach().double(), site.weight.dtype
    W_res = remainder(site)
    if torch.isfinite(W_res).all():
        error = (rebuilt(W_res, site, dtype).double() - wide).abs().max()
        subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert error <= 2 * torch.finfo(W_res.dtype).eps * wide.abs().max() + subnormal
    else:
        assert wide.abs().max() > torch.finfo(W_res.dtype).max / 2


@pytest.mark.matrix(2)
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
        assert "contrast data" in variant.basis_config.gives
        assert not X.any() or not W.any(), error
