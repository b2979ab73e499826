"""What holds of every kind of base weight, from finding its site to undoing; a new kind is picked up by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgery import (
    AdapterError,
    WeightError,
    apply_surgery,
    load_adapter,
    merge,
    report,
    save_adapter,
    set_coeff,
    sites,
    undo_surgery,
)
from surgery.lowerings import REGISTRY
from surgery.modules.base_weights import KINDS
from tests.support.base_weight_models import PARTS, input_of, model_of
from tests.support.lowering_models import shake
from tests.support.model_state import state_of
from tests.support.tolerance import assert_close

each_kind = pytest.mark.parametrize("kind", sorted(KINDS))
R = 4


def operated(kind, model=None, *, given=True, **options):
    model = model_of(kind) if model is None else model
    inputs = input_of(kind) if given else None
    apply_surgery(
        model,
        "antipasto",
        r=R,
        target_modules=PARTS.get(kind, "all-linear"),
        example_inputs=inputs,
        progress=False,
        **options,
    )
    return model


def of_kind(model, kind):
    """The sites whose weight is of a kind."""
    return [site for site in sites(model).values() if site.base_weight.kind == kind]


def run(model, kind):
    with torch.no_grad():
        return model(input_of(kind))


def refusal(site):
    """Why a site takes no change of its weight, or None."""
    with torch.no_grad():
        found = site.base_weight.with_delta(site.delta_factor(torch.float64), site.factors.Vh)
    return found if isinstance(found, str) else None


@each_kind
@pytest.mark.parametrize("given", [True, False])
def test_its_sites_are_found_and_inserting_changes_nothing(kind, given):
    model = model_of(kind)
    base = run(model, kind)
    before = state_of(model)
    operated(kind, model, given=given)
    assert of_kind(model, kind)
    assert list(sites(model)) == sorted(sites(model)), "in the order that they run in"
    assert torch.equal(run(model, kind), base)
    assert {row.key for row in report(model).sites} == set(sites(model))
    assert not torch.equal(run(shake(model), kind), base)
    set_coeff(model, 0.0)
    assert torch.equal(run(model, kind), base)
    undo_surgery(model)
    assert state_of(model) == before
    assert torch.equal(run(model, kind), base)


@each_kind
def test_its_factors_are_those_of_its_matrix(kind):
    for site in of_kind(operated(kind), kind):
        W = site.base_weight.matrix().detach().double()
        assert W.shape == site.factors.shape == site.base_weight.matrix_shape
        assert site.factors.U.dtype == site.base_weight.dtype
        S = torch.linalg.svdvals(W)[..., :R]
        assert_close(site.factors.S.double(), S, torch.float32)
        U, Vh = site.factors.U.double(), site.factors.Vh.double()
        assert_close((U.mT @ W @ Vh.mT).diagonal(dim1=-2, dim2=-1), S, torch.float32)


@each_kind
def test_its_base_forward_is_the_product_with_its_matrix(kind):
    for site in of_kind(operated(kind), kind):
        if site.host.name == "module":
            x = torch.randn(3, site.factors.shape[-1])
            W = site.base_weight.matrix().detach().double()
            bias = None if site.bias is None else site.bias.detach().double()
            expected = nn.functional.linear(x.double(), W, bias)
            given = x.reshape(-1, *site.weight.shape[1:]) if site.host.convolves else x  # one window for each row
            with torch.no_grad():
                assert_close(site.host.owner(given).reshape(expected.shape), expected, torch.float32)


@each_kind
def test_it_trains_and_is_steered(kind):
    model = operated(kind)
    base = run(model, kind)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_of(kind)).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for site in of_kind(model, kind) for p in [site.core.g])
    optimiser.step()
    trained = run(model, kind)
    assert not torch.equal(trained, base)
    set_coeff(model, -1.0)
    assert not torch.equal(run(model, kind), trained)
    set_coeff(model, 0.0)
    assert torch.equal(run(model, kind), base)


@each_kind
@pytest.mark.parametrize("lowering", sorted(REGISTRY))
def test_every_lowering_computes_it_or_says_why_not(kind, lowering):
    model, form = shake(operated(kind)), REGISTRY[lowering].form
    expected = run(model, kind)
    called = [site for site in of_kind(model, kind) if site.host.name == "module"]
    if not called or form != "delta" or any(REGISTRY[lowering].why_not(site) for site in called):
        return
    for site in called:
        site.reschedule(lowering)
    assert_close(run(model, kind), expected)


@each_kind
def test_residual_form_gives_back_the_weight_or_is_refused(kind):
    model = model_of(kind)
    before, base = state_of(model), run(model, kind)
    if not KINDS[kind].holds_entries:
        with pytest.raises(WeightError, match="delta form"):
            operated(kind, model, form="residual")
    else:
        operated(kind, model, form="residual")
        assert_close(run(model, kind), base)
        undo_surgery(model)
    assert state_of(model) == before


@each_kind
@pytest.mark.parametrize("factors", ["exact", "recompute"])
def test_files_hold_it_by_its_fingerprint(kind, factors, tmp_path):
    model = shake(operated(kind))
    found = run(model, kind)
    save_adapter(model, tmp_path, factors=factors)
    loaded = load_adapter(model_of(kind), tmp_path, progress=False)
    assert_close(run(loaded, kind), found)
    if factors == "exact":
        assert torch.equal(run(loaded, kind), found)
    other = model_of(kind)
    place = of_kind(model, kind)[0]
    names = {id(p): name for name, p in model.named_parameters()}
    name = names[id(place.host.parameter())].replace("parametrizations.", "").removesuffix(".original")
    weight = other.get_parameter(name)
    weight.data.copy_(weight.data.roll(1, 0).clone())
    before = state_of(other)
    with pytest.raises(AdapterError, match="fingerprints differ"):
        load_adapter(other, tmp_path, progress=False)
    assert state_of(other) == before


@each_kind
def test_it_is_merged_or_says_why_not(kind):
    model = shake(operated(kind))
    found, before = run(model, kind), state_of(model)
    reasons = [reason for site in of_kind(model, kind) if (reason := refusal(site))]
    if not reasons:
        assert_close(run(merge(model), kind), found)
        return
    with pytest.raises(WeightError, match=f"^site .* cannot be merged: {reasons[0]}"):
        merge(model)
    assert state_of(model) == before
    assert torch.equal(run(model, kind), found)


@each_kind
def test_an_export_that_merges_says_why_not(kind, tmp_path):
    from exporters import export

    model = shake(operated(kind))
    reasons = [reason for site in of_kind(model, kind) if (reason := refusal(site))]
    if reasons:
        with pytest.raises(WeightError, match=f"^site .* cannot be merged: {reasons[0]}"):
            export(model, "dense", tmp_path / "dense", example_inputs=input_of(kind))
    else:
        export(model, "dense", tmp_path / "dense", example_inputs=input_of(kind))


@each_kind
def test_entries_that_are_not_finite_are_named(kind):
    model = operated(kind)
    (name,) = {name for name, p in model.named_parameters() if p is of_kind(model, kind)[0].host.parameter()}
    undo_surgery(model)
    weight = model.get_parameter(name.replace("parametrizations.", "").removesuffix(".original"))
    if not weight.is_floating_point():
        return
    with torch.no_grad():
        weight.view(-1)[3] = float("inf")
    with pytest.raises(WeightError, match=r"1 of .* entries of its weight are not finite"):
        operated(kind, model)
