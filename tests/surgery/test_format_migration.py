"""Adapters of an older format, and adapters on a base in another dtype."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from surgery import load_adapter, merge, save_adapter, sites
from surgery.storage.format_migration import VERSION
from tests.support.adapter_files import configuration
from tests.support.operated_models import operate, operated, randomise
from tests.support.saved_adapters import refused
from tests.support.zoo import HUB_NAMES, small_model

DATA = Path(__file__).parents[1] / "data"
X = torch.arange(12.0).reshape(2, 6) / 8 - 0.5


def exact_model() -> nn.Sequential:
    """Weights that are the same everywhere: the base of the files in tests/data."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            n = torch.arange(p.numel(), dtype=torch.float32)
            p.copy_(((n * n * 7 + 3 * n + i) % 23 - 11).reshape(p.shape) / 16)
    return model


@pytest.mark.parametrize("name", [*(f"format_{version}" for version in range(1, VERSION)), "format_2_recompute"])
def test_an_adapter_of_an_older_format_loads(name, tmp_path):
    base = exact_model()
    with torch.no_grad():
        plain = base(X)
    model = load_adapter(base, DATA / name)
    found = sites(model)
    assert {key: site.variant.name for key, site in found.items()} == {"0": "antipasto", "2": "antipasto_rot"}
    assert found["0"].core.g.tolist() == [-0.25, -0.125, 0.0, 0.125]
    with torch.no_grad():
        out = model(X)
    assert (out - plain).abs().max() > 0.1
    save_adapter(model, tmp_path / "new")  # and is written in the present one
    assert configuration(tmp_path / "new")["format_version"] == VERSION
    again = load_adapter(exact_model(), tmp_path / "new")
    with torch.no_grad():
        assert torch.equal(again(X), out)
        assert (merge(again)(X) - out).abs().max() < 1e-5


def test_an_older_format_does_not_know_other_dtypes(tmp_path):
    shutil.copytree(DATA / "format_1", tmp_path / "old")
    message = refused(tmp_path / "old", exact_model().bfloat16())
    assert "is for a weight of shape [8, 6] and float32, the model's is [8, 6] and bfloat16" in message
    wide = load_adapter(exact_model().double(), tmp_path / "old")
    assert {site.factors.U.dtype for site in sites(wide).values()} == {torch.float64}


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", ["mlp", "attention", "raw", "gpt2", "mixtral" if "mixtral" in HUB_NAMES else "qwen3"])
@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("loaded", DTYPES)
def test_on_a_base_in_another_dtype_an_adapter_is_what_a_cast_makes_of_it(saved, loaded, name, tmp_path):
    found = operate(small_model(name, saved), r=4)
    randomise(found.model, 0.3)
    save_adapter(found.model, tmp_path / "adapter")
    fresh = small_model(name, saved)
    fresh.model.to(loaded)
    load_adapter(fresh.model, tmp_path / "adapter")
    expected = copy.deepcopy(found.model).to(loaded)
    for one, other in zip(sites(fresh.model).values(), sites(expected).values(), strict=True):
        parts = [(s.factors.U, s.factors.S, s.factors.Vh, *s.core.tensors().values(), s.weight) for s in (one, other)]
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*parts, strict=True))
        assert one.steering.coeff.dtype == other.steering.coeff.dtype
    inputs = small_model(name, loaded).inputs
    assert torch.equal(fresh.run(inputs=inputs), fresh.run(expected, inputs))


@pytest.mark.parametrize("loaded", DTYPES)
def test_a_base_that_was_trained_further_is_refused_in_every_dtype(loaded, tmp_path):
    save_adapter(operated("mlp").model, tmp_path)
    other = small_model("mlp").model
    with torch.no_grad():
        other[2].weight[3, 3] *= 1.01
    assert "fingerprints differ" in refused(tmp_path, other.to(loaded))


def test_a_dtype_of_the_factors_is_kept_on_another_base(tmp_path):
    found = operate(small_model("mlp"), variant=surgery.AntiPaSTO(r=4, factors_dtype="float32"), r=None)
    save_adapter(randomise(found.model), tmp_path)
    half = load_adapter(small_model("mlp").model.bfloat16(), tmp_path)
    assert {site.factors.U.dtype for site in sites(half).values()} == {torch.float32}


def test_factors_that_overflow_on_another_base_are_refused(tmp_path):
    model = nn.Linear(6, 6)
    with torch.no_grad():
        model.weight.copy_(torch.full((6, 6), 6e4))  # its singular value is 3.6e5
    x = torch.ones(1, 6)
    save_adapter(surgery.apply_surgery(model, "antipasto", r=2, example_inputs=x, progress=False), tmp_path)
    fresh = nn.Linear(6, 6)
    fresh.load_state_dict({"weight": torch.full((6, 6), 6e4), "bias": torch.zeros(6)})
    assert "its factors overflow torch.float16; load it on the model in float32" in refused(tmp_path, fresh.half())
