"""Where an adapter lives: in the module that is called, or on the weight that is read."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from surgery import WeightError, load_adapter, report, save_adapter, sites, undo_surgery
from tests.support.model_state import state_of
from tests.support.operated_models import operate, randomise
from tests.support.tolerance import assert_close
from tests.support.zoo import SmallModel, small_model


def gains(found: SmallModel, value: float) -> SmallModel:
    with torch.no_grad():
        for site in sites(found.model).values():
            site.core.g.fill_(value)
    return found


class Named(nn.Linear):
    """A linear module with something of its own beside the product."""

    scale = 2.0

    def halved(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.scale


class Reader(nn.Module):
    """Calls its linear module, and asks what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = Named(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.proj, Named)
        return self.proj(self.proj.halved(x))


@pytest.mark.parametrize("given", [True, False])
def test_a_subclass_of_a_linear_module_keeps_what_is_its_own(given):
    found = SmallModel("reader", Reader(), torch.randn(2, 4))
    before, base = state_of(found.model), found.run()
    operate(found, r=2, example_inputs=found.inputs if given else None)
    assert torch.equal(found.run(), base)
    assert not torch.equal(gains(found, 0.5).run(), base)
    undo_surgery(found.model)
    assert state_of(found.model) == before


class Tied(nn.Module):
    """Two modules that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(torch.tanh(self.one(x)))


def test_a_tied_weight_that_is_named_is_adapted_in_each_use():
    found = SmallModel("tied", Tied(), torch.randn(3, 4))
    before, base = state_of(found.model), found.run()
    operate(found, r=2, target_modules=["one"])
    assert list(sites(found.model)) == ["one"]
    W = found.model.other.weight
    expected = W + sites(gains(found, 0.5).model)["one"].delta_weight()
    hidden = torch.tanh(nn.functional.linear(found.inputs, expected, found.model.one.bias))
    assert_close(found.run(), nn.functional.linear(hidden, W, found.model.other.bias).detach())
    undo_surgery(found.model)
    assert state_of(found.model) == before
    assert torch.equal(found.run(), base)


class Backwards(nn.Module):
    """Parameters that are used in another order than they are registered in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3))
        self.second = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.second @ self.first


def test_undo_restores_the_order_of_parameters_whatever_the_order_of_use():
    found = SmallModel("backwards", Backwards(), torch.randn(2, 4))
    before = state_of(found.model)
    undo_surgery(operate(found, r=2).model)
    assert state_of(found.model) == before


@pytest.mark.parametrize("name", ["mlp", "raw", "attention", "encoder_layer"])
def test_without_example_inputs(name):
    found, other = operate(small_model(name), example_inputs=None), operate(small_model(name))
    for operated in (found, other):
        with torch.no_grad():
            for site in sites(operated.model).values():
                site.core.g.fill_(0.5)
    assert {key: site.host.name for key, site in sites(found.model).items()} == {
        key: site.host.name for key, site in sites(other.model).items()
    }
    assert_close(found.run(), other.run())


def test_attention_over_another_sequence():
    q, k = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    found = operate(SmallModel("cross", nn.MultiheadAttention(16, 4, batch_first=True).eval(), (q, k, k)))
    named = [*sites(found.model), *(f"{s.where} {s.reason}" for s in report(found.model).skipped)]
    assert "in_proj_weight" in " ".join(named)


def hooked() -> SmallModel:
    """A model whose linear modules have hooks of accelerate, which put a forward of their own into each of them."""
    found = small_model("qwen3")
    for module in found.model.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    return found


@pytest.mark.matrix
@pytest.mark.parametrize("saved_on", ["plain", "hooked"])
@pytest.mark.parametrize("loaded_on", ["plain", "hooked"])
def test_an_adapter_on_a_model_that_accelerate_has_dispatched(saved_on, loaded_on, tmp_path):
    makers = {"plain": lambda: small_model("qwen3"), "hooked": hooked}
    found, fresh = makers[saved_on](), makers[loaded_on]()
    before, base = state_of(fresh.model), fresh.run()
    randomise(operate(found).model)
    assert (found.run() - base).abs().max() > 0.01
    load_adapter(fresh.model, save_adapter(found.model, tmp_path))
    assert_close(fresh.run(), found.run(), torch.float32)
    assert {site.host.name for site in sites(fresh.model).values()} <= {"module", "weight"}
    undo_surgery(fresh.model)
    assert state_of(fresh.model) == before
    assert torch.equal(fresh.run(), base)


def test_a_model_whose_weights_are_offloaded_is_refused(tmp_path):
    save_adapter(operate(small_model("qwen3")).model, tmp_path)
    found = small_model("qwen3")
    cpu_offload(found.model, execution_device=torch.device("cpu"))
    for attempt in (lambda: operate(found), lambda: load_adapter(found.model, tmp_path)):
        with pytest.raises(WeightError, match="on the meta device; load the weights"):
            attempt()
    assert sites(found.model) == {}
