"""The contract that every registered variant keeps, and antipasto's equation against an independent reference."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.modules.coefficients import RowLayout, by_rows
from surgery.variants import resolve_variant, variant_from_dict
from tests.support.tolerance import assert_close
from tests.support.variant_cases import (
    D_IN,
    DTYPES,
    R,
    adapted,
    core_of,
    each_variant,
    s_space,
)


@each_variant
def test_configuration_is_a_frozen_dataclass(variant):
    assert dataclasses.is_dataclass(variant)
    assert variant.r == 256
    with pytest.raises(dataclasses.FrozenInstanceError):
        variant.r = 1


@each_variant
def test_public_under_its_own_name(variant):
    cls = type(variant)
    assert getattr(surgery, cls.__name__) is cls
    assert type(resolve_variant(variant.name)) is cls


@each_variant
def test_hyperparameters_round_trip_through_json(variant):
    variant = dataclasses.replace(variant, r=7, factors_dtype="float32")
    values = json.loads(json.dumps(variant.hyperparameters()))
    assert variant_from_dict(variant.name, values) == variant
    assert resolve_variant(variant, 5) == dataclasses.replace(variant, r=5)


@each_variant
def test_unknown_hyperparameter_is_named(variant):
    with pytest.raises(surgery.VariantError, match="no hyper-parameter nonsense"):
        variant_from_dict(variant.name, {**variant.hyperparameters(), "nonsense": 1})


@each_variant
@pytest.mark.parametrize("r", [0, -3, True, 2.0, "8", None])
def test_a_rank_that_is_no_positive_integer_is_refused(variant, r):
    with pytest.raises(surgery.RankError, match="at least 1"):
        type(variant)(r=r)


@each_variant
def test_an_unknown_factors_dtype_is_refused(variant):
    with pytest.raises(surgery.VariantError, match="float8"):
        dataclasses.replace(variant, factors_dtype="float8")


@each_variant
@pytest.mark.parametrize("limit", [1, 2, 7, 64])
def test_core_of_any_rank(variant, limit):
    r = variant.rank(limit)
    assert 1 <= r <= limit
    once, again = (variant.init_core(r, torch.Generator().manual_seed(3)) for _ in range(2))
    assert list(once) == list(again)
    for name, tensor in once.items():
        assert (tensor.dtype, tensor.device.type) == (torch.float32, "cpu")
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, again[name])


@each_variant
@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_is_exactly_zero_at_coeff_zero(variant, dtype):
    h, S = s_space(dtype)
    delta = variant.delta(h, S, core_of(variant, scale=2.0, dtype=S.dtype), torch.zeros((), dtype=S.dtype))
    assert (delta.shape, delta.dtype) == (h.shape, h.dtype)
    assert torch.equal(delta, torch.zeros_like(h))


@each_variant
@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_is_exactly_zero_at_the_initial_core(variant, dtype):
    h, S = s_space(dtype)
    delta = variant.delta(h, S, core_of(variant, dtype=S.dtype), torch.ones((), dtype=S.dtype))
    # a variant that does not start at identity says so; its delta must then be something
    assert torch.equal(delta, torch.zeros_like(h)) == variant.identity_at_init


@each_variant
def test_delta_is_not_zero_away_from_identity(variant):
    h, S = s_space()
    assert variant.delta(h, S, core_of(variant, scale=1.0), torch.ones(())).abs().max() > 0.1


@each_variant
def test_delta_weight_has_the_effect_of_the_adapter(variant):
    base, site = adapted(variant, scale=0.7)
    if not variant.linear:
        with pytest.raises(surgery.VariantError, match="not linear"):
            site.delta_weight()
        return
    x = torch.randn(5, D_IN, dtype=torch.float64)
    delta_weight = site.delta_weight().detach()
    assert (delta_weight.shape, delta_weight.dtype) == (base.weight.shape, torch.float64)
    assert_close(site.host.owner(x).detach(), base(x).detach() + x @ delta_weight.T)
    assert_close(site.adapter_term(x).detach(), x @ delta_weight.T)


@each_variant
def test_linear_says_whether_delta_is_linear_in_h(variant):
    (h, S), (other, _) = s_space(torch.float64), s_space(torch.float64)
    core, one = core_of(variant, scale=1.0, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    delta = lambda x: variant.delta(x, S, core, one)  # noqa: E731
    close = torch.allclose(delta(2 * h - 3 * other), 2 * delta(h) - 3 * delta(other))
    assert close == variant.linear


@each_variant
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2)])
def test_coeff_per_row_is_the_scalar_one_row_by_row(variant, shape):
    h, S = s_space(torch.float64, *shape)
    core, coeff = (
        core_of(variant, scale=1.0, dtype=torch.float64),
        torch.tensor([0.0, 1.0, -0.5, 2.0], dtype=torch.float64),
    )
    view = by_rows(coeff, h, RowLayout(0, "entries"), rows="exact", known=False, key="0")
    together = variant.delta(view.h, S, core, view.coeff)
    for i, value in enumerate(coeff):
        assert_close(together[i].detach(), variant.delta(h[i], S, core, value).detach())


@each_variant
def test_gradients_reach_every_core_parameter(variant):
    h, S = s_space()
    core = core_of(variant, scale=-0.5)
    if not list(core.parameters()):
        return
    if variant.init_core(R, torch.Generator()).get("g") is not None:
        with torch.no_grad():
            core.g.copy_(-core.g.abs())  # inside the range that suppress_only leaves
    variant.delta(h, S, core, torch.ones(())).square().sum().backward()
    for name, parameter in core.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@each_variant
def test_something_can_be_learnt_from_the_initial_core(variant):
    core = core_of(variant)
    if not list(core.parameters()):
        return
    h, S = s_space()
    variant.delta(h, S, core, torch.ones(())).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in core.parameters())


@each_variant
def test_delta_is_a_pure_function(variant):
    h, S = s_space()
    core, coeff = core_of(variant, scale=1.0), torch.tensor(0.7)
    inputs = [h, S, coeff, *core.parameters()]
    before = [tensor.detach().clone() for tensor in inputs]
    random_state = torch.get_rng_state()
    once, again = variant.delta(h, S, core, coeff), variant.delta(h, S, core, coeff)
    assert torch.equal(once, again)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(now, old) for now, old in zip(inputs, before, strict=True))


@each_variant
@pytest.mark.parametrize("gain", [50.0, -50.0])
@pytest.mark.parametrize("coeff", [1.0, -1.0])
def test_huge_cores_stay_finite(variant, gain, coeff):
    h, S = s_space()
    core = core_of(variant)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.fill_(gain)
    delta = variant.delta(h, S, core, torch.tensor(coeff))
    assert torch.isfinite(delta).all()
    if delta.requires_grad:
        delta.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in core.parameters())


gains = st.lists(st.floats(-60, 60), min_size=R, max_size=R)


@given(gains, st.floats(-3, 3), st.booleans())
def test_antipasto_is_its_equation(g, coeff, suppress_only):
    rng = np.random.default_rng(0)
    h, S, g = rng.normal(size=(5, R)), np.sort(rng.uniform(0.1, 9, R))[::-1].copy(), np.array(g)
    core, coefficient = SimpleNamespace(g=torch.tensor(g)), torch.tensor(coeff, dtype=torch.float64)
    found = surgery.AntiPaSTO(suppress_only=suppress_only).delta(torch.tensor(h), torch.tensor(S), core, coefficient)
    z = coeff * (np.minimum(g, 0) if suppress_only else g)
    reference = h * S * np.where(z > 0, z, np.expm1(np.minimum(z, 0)))
    assert_close(found, torch.tensor(reference))


@given(gains, st.floats(0, 5))
def test_suppress_only_never_amplifies(g, coeff):
    variant, S = surgery.AntiPaSTO(suppress_only=True), torch.linspace(4, 1, R, dtype=torch.float64)
    core, coefficient = (
        SimpleNamespace(g=torch.tensor(g, dtype=torch.float64)),
        torch.tensor(coeff, dtype=torch.float64),
    )
    gain = 1 + torch.diagonal(variant.delta(torch.eye(R, dtype=torch.float64), S, core, coefficient)) / S
    assert (gain <= 1).all()
    assert (gain >= 0).all()


def test_suppress_only_passes_the_whole_gradient_at_zero():
    (h, S), gradients = s_space(), []
    for suppress_only in (False, True):
        variant = surgery.AntiPaSTO(suppress_only=suppress_only)
        core = core_of(variant)
        variant.delta(h, S, core, torch.ones(())).sum().backward()
        gradients.append(core.g.grad)
    assert_close(gradients[0], (h * S).sum(dim=(0, 1)))
    assert torch.equal(*gradients)


def test_antipasto_keeps_small_gains_that_a_half_dtype_would_round_away():
    h, S = s_space(torch.bfloat16)
    core = SimpleNamespace(g=torch.full((R,), 1e-6))
    assert_close(surgery.AntiPaSTO().delta(h, S, core, torch.ones(())), h * (S * 1e-6).to(h.dtype))


def test_antipasto_has_no_zero_times_overflow():
    h, S = torch.full((2, R), 6e4, dtype=torch.float16), torch.full((R,), 1e3)
    assert torch.equal(surgery.AntiPaSTO().delta(h, S, SimpleNamespace(g=torch.zeros(R)), torch.ones(())), 0 * h)


def test_an_unknown_variant_lists_the_known_ones():
    with pytest.raises(surgery.VariantError, match=r"did you mean 'antipasto'.*known: .*antipasto"):
        resolve_variant("antipsto")


def test_a_variant_that_is_no_configuration_is_refused():
    with pytest.raises(surgery.VariantError, match="not int"):
        resolve_variant(3)
