"""What inference keeps of a core: made once, never stale, without a graph, not copied."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import surgery
from passes.infra.tolerance import disagreement
from surgery import apply_surgery, set_coeff, sites
from surgery.cores import ablate
from surgery.cores.ablate import orthonormal
from surgery.lowerings._weight_cache import PREPARED
from tests.support.core_deltas import some


def ablated(seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5)), some(3, 6).float()
    variant = surgery.AntiPaSTOAblate(k=2, init_alpha=0.5)
    return apply_surgery(model, variant, target_modules="all-linear", example_inputs=x, progress=False), x


def without_kept(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output in grad mode, where nothing is kept."""
    return model(x).detach()


@pytest.fixture
def calls(monkeypatch):
    """Counts how often directions are made orthonormal."""
    seen: list[int] = []

    def counted(c: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return orthonormal(c)

    monkeypatch.setattr(ablate, "orthonormal", counted)
    return seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_makes_directions_orthonormal_once(calls, mode):
    model, x = ablated()
    calls.clear()
    with mode():
        for _ in range(5):
            model(x)
        assert len(calls) == 2  # one for each site
        set_coeff(model, 0.3)
        model(x)
        assert len(calls) == 2
    model(x)
    assert len(calls) == 4


@torch.no_grad()
def change_data(model: nn.Module) -> None:
    for site in sites(model).values():
        site.core.c.copy_(some(*site.core.c.shape, seed=5))


def change_one_entry_of_data(model: nn.Module) -> None:
    sites(model)["0"].core.c.data[0, 0] += 1
    surgery.refresh(model)


def change_alpha(model: nn.Module) -> None:
    with torch.no_grad():
        sites(model)["0"].core.alpha.fill_(0.9)


def load(model: nn.Module) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items() if ".c" in name}, strict=False)


def assign(model: nn.Module) -> None:
    state = {name: value + 1 for name, value in model.state_dict().items() if name.endswith("core.c")}
    model.load_state_dict(state, strict=False, assign=True)


def optimise(model: nn.Module) -> None:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    with torch.enable_grad():
        model(some(3, 6).float()).square().sum().backward()
    optimiser.step()


def replace(model: nn.Module) -> None:
    core = sites(model)["0"].core
    core.c = nn.Parameter(core.c.detach().roll(1, 0))


def cast(model: nn.Module) -> None:
    model.double()


@pytest.mark.parametrize(
    "change", [change_data, change_one_entry_of_data, change_alpha, load, assign, optimise, replace, cast]
)
def test_inference_notices_that_a_core_has_changed(change):
    model, x = ablated()
    with torch.no_grad():
        before = model(x)
        change(model)
        x = x.to(next(model.parameters()).dtype)
        after = model(x)
        again = model(x)
    assert torch.equal(after, again)
    assert disagreement(after, without_kept(model, x)) is None
    assert change is cast or not torch.equal(after, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_inference_keeps_has_no_graph(mode):
    model, x = ablated()
    with mode():
        model(x)
        for site in sites(model).values():
            assert not site.cache.peek(PREPARED).basis.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_copies_and_pickles_of_a_model_that_has_run(mode):
    model, x = ablated()
    with mode():
        expected = model(x)
    duplicate = copy.deepcopy(model)
    cores = {key: pickle.loads(pickle.dumps(site.core)) for key, site in sites(model).items()}
    whole = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(duplicate(x), expected)
        assert torch.equal(whole(x), expected)
        change_data(duplicate)
        assert not torch.equal(duplicate(x), expected)
        assert torch.equal(model(x), expected)
        for key, site in sites(model).items():
            assert all(torch.equal(t, cores[key].tensors()[n]) for n, t in site.core.tensors().items())
    model(x).square().sum().backward()
    assert all(site.core.c.grad.abs().max() > 0 for site in sites(model).values())


def test_refresh_drops_what_inference_keeps():
    model = nn.Sequential(nn.Linear(6, 5))
    apply_surgery(model, surgery.AntiPaSTOAblate(r=4, k=2), target_modules="all-linear", progress=False)
    site = sites(model)["0"]
    with torch.no_grad():
        model(torch.ones(2, 6))
    assert PREPARED in site.cache
    assert surgery.refresh(model) is model
    assert PREPARED not in site.cache
