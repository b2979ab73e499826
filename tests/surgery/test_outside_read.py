"""A weight that is also read where its module is not called: the other path has the adapter, in train and eval."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import surgery
from surgery import apply_surgery, merge, sites, steer
from tests.support.lowering_models import shake
from tests.support.tolerance import assert_close
from tests.support.user_models import Own, TwoPaths, X, two_paths


@pytest.mark.parametrize("kind", [nn.Linear, Own])
@pytest.mark.parametrize("form", ["delta", "residual"])
@pytest.mark.parametrize("training", [False, True])
def test_both_paths_compute_one_function(kind: type[nn.Linear], form: str, training: bool) -> None:
    model = two_paths(kind, form=form)
    base = two_paths(kind)
    assert torch.equal(model(X, read=True), base(X, read=True))
    shake(model).train(training)
    site = sites(model)["head"]
    W = site.weight.detach().double() + site.delta_weight(torch.float64).detach()
    expected = F.linear(X.double(), W, model.head.bias.detach().double())
    for coeff in (1.0, -0.5, 0.0):
        with steer(model, coeff):
            W = site.weight.detach().double() + site.delta_weight(torch.float64).detach()
            expected = F.linear(X.double(), W, model.head.bias.detach().double())
            for grad in (torch.no_grad, torch.enable_grad, torch.inference_mode):
                with grad():
                    for read in (False, True):
                        assert_close(model(X, read=read), expected)
                        assert_close(model(X, read=read, penalty=True), expected + W.norm())
    (core,) = (p for p in model.parameters() if p.requires_grad)
    gradients = [torch.autograd.grad(model(X, read=read).square().sum(), core)[0] for read in (False, True)]
    assert_close(gradients[1], gradients[0])
    expected = model(X, read=True, penalty=True).detach()
    merge(model)
    assert_close(model(X, read=True, penalty=True), expected)


def test_outside_of_a_call_the_weight_is_the_parameter_itself() -> None:
    model = two_paths()
    parameter = model.head._parameters["weight"]
    model(X, read=True)
    assert model.head.weight is parameter
    assert isinstance(model.head.weight, nn.Parameter)
    assert [name for name, _ in model.named_parameters()][:1] == ["head.weight"]
    with pytest.raises(AttributeError):
        model.head.no_such_thing  # noqa: B018


def test_what_asks_for_the_dtype_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = shake(two_paths()), []
    site = sites(model)["head"]
    plain = type(site).changed_weight
    monkeypatch.setattr(type(site), "changed_weight", lambda s, w: (made.append(1), plain(s, w))[1])
    model(X)
    assert not made
    with torch.no_grad():
        model(X, read=True)
        model(X, read=True)
    assert len(made) == 1, "and in inference it is computed once"


def test_what_cannot_be_right_is_a_typed_error() -> None:
    model = shake(two_paths())
    rows = steer(model, torch.linspace(-1, 1, 3))
    with rows, pytest.raises(surgery.InputError, match=r"site 'head': its weight is read without a call"):
        model(X, read=True)

    class Writes(TwoPaths):
        def forward(self, x: torch.Tensor, read: bool = False, penalty: bool = False) -> torch.Tensor:
            with torch.no_grad():
                self.head.weight.clamp_(-0.1, 0.1)
            return self.head(x)

    writes = Writes()
    with pytest.raises(surgery.SurgeryError, match=r"site 'head': its weight is written \(clamp_\)"):
        apply_surgery(writes, "antipasto", r=4, target_modules="all-linear", progress=False)(X)


def test_a_variant_that_is_not_linear_says_so() -> None:
    data = surgery.Contrast([X + 1], [X - 1])
    model = two_paths(variant="sspace", calibration=data)
    assert torch.isfinite(model(X)).all()
    with pytest.raises(surgery.VariantError, match=r"site 'head': its weight is read .* sspace is not linear"):
        model(X, read=True)


@pytest.mark.parametrize("change", ["coeff", "core", "train"])
def test_nothing_is_kept_by_parametrize_cached(change: str) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 16)
    apply_surgery(model, "antipasto", r=8, example_inputs=x, progress=False)
    shake(model)
    with torch.no_grad(), parametrize.cached():
        before = model(x)
        if change == "coeff":
            surgery.set_coeff(model, 0.0)
        elif change == "core":
            shake(model, seed=7)
        else:
            with torch.enable_grad():
                optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
                model(x).square().sum().backward()
                optimiser.step()
        inside = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), inside)
    assert not torch.equal(before, inside)
