"""Raw weights of a model that no capture takes: experts that are multiplied one by one, from surgery to merging."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from surgery import (
    WeightError,
    apply_surgery,
    inspect_sites,
    load_adapter,
    merge,
    recalibrate,
    report,
    save_adapter,
    set_coeff,
    sites,
    undo_surgery,
)
from tests.support.model_state import state_of
from tests.support.tolerance import assert_close

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """A router, and experts in one parameter of which each is multiplied by the tokens that are routed to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.w = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        expert = self.router(x).argmax(-1)
        y = x.new_zeros(len(x), 6)
        for i in expert.unique().tolist():
            y[expert == i] = F.linear(x[expert == i], self.w[i])
        return y


def operated(scale: float = 0.4) -> nn.Module:
    model = apply_surgery(Experts().eval(), "antipasto", r=3, example_inputs=X, progress=False)
    with torch.no_grad():
        sites(model)["w"].core.g.copy_(torch.linspace(-scale, scale, 12).reshape(4, 3))
    return model


def expected(model: nn.Module, coeff: float = 1.0) -> torch.Tensor:
    """The base in float64 with the weights that the experts should have."""
    site = sites(model)["w"]
    U, S, Vh = (f.double() for f in (site.factors.U, site.factors.S, site.factors.Vh))
    plain = Experts().double().eval()
    with torch.no_grad():
        plain.w += (U * (S * F.elu(coeff * site.core.g.double()))[:, None, :]) @ Vh
        return plain(X.double()).float()


def test_experts_that_are_multiplied_one_by_one_are_sites():
    model = Experts().eval()
    state, base = state_of(model), model(X).detach()
    apply_surgery(model, "antipasto", r=3, example_inputs=X, progress=False)
    found = report(model)
    assert [(row.key, row.stack, row.host) for row in found.sites] == [("router", None, "module"), ("w", 4, "weight")]
    assert found.skipped == ()
    assert not found.captured
    assert torch.equal(model(X), base)
    undo_surgery(model)
    assert state_of(model) == state
    assert torch.equal(model(X), base)


def test_they_train_and_are_steered_saved_and_merged(tmp_path):
    model = operated()
    model(X).square().sum().backward()
    assert (sites(model)["w"].core.g.grad.abs().amax(1) > 0).sum() == len(model.router(X).argmax(-1).unique())
    with torch.no_grad():
        for coeff in (1.0, -0.5):
            set_coeff(model, coeff)
            assert_close(model(X), expected(model, coeff))
        assert torch.equal(set_coeff(model, 0.0)(X), Experts()(X))
        set_coeff(model, 1.0)
        loaded = load_adapter(Experts().eval(), save_adapter(model, tmp_path / "a"), progress=False)
        assert torch.equal(loaded(X), model(X))
        assert_close(merge(copy.deepcopy(model))(X), expected(model))


def test_every_matrix_of_the_model_is_named_where_no_inputs_are_given():
    found = inspect_sites(Experts())
    assert [site.key for site in found.sites] == ["router"]
    assert [skip.where for skip in found.skipped] == ["w"]


@pytest.mark.parametrize(
    "verb",
    [
        merge,
        lambda model: save_adapter(model, "never-written"),
        lambda model: save_adapter(model, "never-written", factors="recompute"),
        lambda model: recalibrate(model, [X], reset=True, progress=False),
    ],
    ids=["merge", "save", "save recomputed", "recalibrate"],
)
def test_a_model_on_the_meta_device_has_no_values_to_read(verb):
    model = apply_surgery(nn.Sequential(nn.Linear(8, 8)), "antipasto", r=2, progress=False).to("meta")
    with pytest.raises(
        WeightError, match=r"site '0': its tensors are offloaded, or were never loaded.*load them first"
    ):
        verb(model)
    set_coeff(model, 0.5)
    assert type(undo_surgery(model)[0]) is nn.Linear
