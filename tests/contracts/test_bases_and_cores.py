"""The contract of every basis and of every core by itself: configurations, factors, gradients."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import surgery
from surgery.bases import Basis, basis_of
from surgery.cores import core_of
from surgery.factors.statistic import KINDS
from surgery.support.configuration import as_entry
from tests.support.pairs import (
    BASIS_CONFIGS,
    CORE_CONFIGS,
    D_IN,
    D_OUT,
    F64,
    R,
    each_basis,
    each_core,
    label,
    plain,
    some,
    statistic_of,
)
from tests.support.tolerance import assert_close


@pytest.mark.parametrize("configuration", [*BASIS_CONFIGS, *CORE_CONFIGS], ids=label)
def test_a_configuration_is_frozen_and_round_trips_through_json(configuration):
    read = basis_of if isinstance(configuration, Basis) else core_of
    entry = json.loads(json.dumps(as_entry(configuration)))
    assert read(entry) == configuration
    assert hash(read(entry)) == hash(configuration)
    assert read(configuration) is configuration
    assert read(configuration.name) == type(configuration)() == read(type(configuration))
    with pytest.raises(dataclasses.FrozenInstanceError):
        configuration.name = "other"
    with pytest.raises(surgery.VariantError, match=rf"{configuration.kind} '{configuration.name}' has no .* nonsense"):
        read(entry | {"nonsense": 1})
    for wrong in (3, None, ["svd"], {"name": 3}, {}):
        with pytest.raises(surgery.VariantError, match=f"{configuration.kind} must be a name"):
            read(wrong)
    with pytest.raises(surgery.VariantError, match=f"unknown {configuration.kind} 'nonsense'"):
        read("nonsense")
    for field in dataclasses.fields(configuration):
        if isinstance(getattr(configuration, field.name), bool):
            with pytest.raises(surgery.VariantError, match=f"{field.name} must be True or False"):
                dataclasses.replace(configuration, **{field.name: 1})


@each_basis
@pytest.mark.parametrize("shape", [(D_OUT, D_IN), (D_IN, D_OUT), (7, 7), (1, 5)])
def test_the_factors_are_what_the_basis_says(basis, shape):
    weight = some(*shape, seed=3)
    assert basis.statistic in KINDS
    for r in sorted({1, min(3, *shape), min(shape)}):
        once, again = (basis.factorise(weight, r, statistic_of(basis, weight), 0) for _ in range(2))
        U, S, Vh = (getattr(once, name).to(F64) for name in ("U", "S", "Vh"))
        assert all(torch.equal(getattr(once, name), getattr(again, name)) for name in ("U", "S", "Vh"))
        assert (U.shape, S.shape, Vh.shape) == ((shape[0], r), (r,), (r, shape[1]))
        assert all(torch.isfinite(t).all() for t in (U, S, Vh, *once.core.values()))
        assert (S >= 0).all()
        assert (S.diff() <= 0).all()
        if "orthonormal U" in basis.gives:
            assert_close(U.T @ U, torch.eye(r, dtype=F64))
            assert_close(S[:, None] * Vh, U.T @ weight)
        if "orthonormal Vh" in basis.gives:
            assert_close(Vh @ Vh.T, torch.eye(r, dtype=F64))
        assert ("direction" in once.core) == ("contrast data" in basis.gives)


@each_basis
def test_a_basis_without_data_has_factors_or_says_what_it_needs(basis):
    weight, config = some(D_OUT, D_IN, seed=3), dataclasses.replace(surgery.AntiPaSTO(r=3), basis=basis)
    assert config.needs_calibration == basis.needs_calibration
    assert config.statistic == basis.statistic
    if basis.needs_calibration:
        with pytest.raises(surgery.VariantError, match="calibration"):
            basis.factorise(weight, 3, None, 0)
        with pytest.raises(surgery.VariantError, match="needs data to choose its factors by"):
            surgery.apply_surgery(plain(), config, progress=False)
    else:
        assert basis.factorise(weight, 3, None, 0).S.shape == (3,)


@each_core
def test_gradients_are_those_of_finite_differences(core):
    r = core.rank(R)
    S = torch.linspace(3, 0.4, r, dtype=F64)
    tensors = core.init_core(r, torch.Generator().manual_seed(0))
    assert set(core.frozen) <= set(tensors)
    names = list(tensors)
    values = [some(*tensors[name].shape, seed=i) * 0.6 for i, name in enumerate(names)]
    values = [v.abs() / v.abs().max() * 0.9 if n == "alpha" else v for n, v in zip(names, values, strict=True)]

    def delta(h: torch.Tensor, coeff: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
        return core.delta(h, S, SimpleNamespace(**dict(zip(names, held, strict=True))), coeff)

    free = [v.clone().requires_grad_(name not in core.frozen) for name, v in zip(names, values, strict=True)]
    coeff, h = torch.tensor(0.6, dtype=F64, requires_grad=True), some(3, r, seed=9).requires_grad_(True)
    assert torch.autograd.gradcheck(delta, (h, coeff, *free))
    prepared = core.prepare(SimpleNamespace(**dict(zip(names, values, strict=True))))
    assert core.prepares or not prepared
    held = SimpleNamespace(**dict(zip(names, values, strict=True)), **prepared)
    assert_close(core.delta(h, S, held, coeff).detach(), delta(h, coeff, *values).detach())


@each_core
def test_a_function_of_sh_is_one(core):
    r, other = core.rank(R), torch.tensor([2.0, 0.5, 3.0, 1.5, 0.25], dtype=F64)
    tensors = core.init_core(r, torch.Generator().manual_seed(0))
    held = SimpleNamespace(**{name: some(*t.shape, seed=i) * 0.6 for i, (name, t) in enumerate(tensors.items())})
    h, S, one = some(3, r, seed=9), torch.linspace(3, 0.4, r, dtype=F64), torch.ones((), dtype=F64)
    same = torch.allclose(core.delta(h, S, held, one), core.delta(h * other[:r], S / other[:r], held, one))
    assert same == core.depends_only_on_Sh
