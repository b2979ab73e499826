"""Factors that come from a file are those of the weight, or loading says what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import load_adapter, save_adapter, sites
from surgery.factors.svd import METHODS
from surgery.modules.core import Factors
from surgery.modules.factor_fit import why_not_of
from surgery.variants import resolve_variant
from tests.support.adapter_files import edit_config, edit_tensors
from tests.support.pairs import BASIS_CONFIGS, CORE_CONFIGS, label, operated, plain
from tests.support.saved_adapters import refused

Tensors = dict[str, torch.Tensor]


def scaled(name: str, factor: float, row: int | None = None) -> Callable[[Tensors], Any]:
    """Multiply a factor, or one of its directions."""

    def edit(tensors: Tensors) -> None:
        tensor = tensors[f"0.factors.{name}"]
        part = tensor if row is None else tensor[:, row] if name == "U" else tensor[row]
        part.mul_(factor)

    return edit


def turned(tensors: Tensors) -> None:
    """Turn U and Vh by one orthogonal matrix: each is as orthonormal as it was."""
    r = len(tensors["0.factors.S"])
    Q = torch.linalg.qr(torch.randn(r, r, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    for name, rows in (("U", False), ("Vh", True)):
        tensor = tensors[f"0.factors.{name}"]
        tensor.copy_(Q.to(tensor.dtype) @ tensor if rows else tensor @ Q.to(tensor.dtype))


FAULTS: dict[str, Callable[[Tensors], Any]] = {
    "U by 1000": scaled("U", 1000.0),
    "U by -1": scaled("U", -1.0),
    "U by 1.1": scaled("U", 1.1),
    "a column of U by 1000": scaled("U", 1000.0, -1),
    "S by 1000": scaled("S", 1000.0),
    "S by 0.5": scaled("S", 0.5),
    "a negative S": scaled("S", -1.0, -1),
    "a larger S": scaled("S", 1000.0, -1),
    "Vh by 1000": scaled("Vh", 1000.0),
    "a row of Vh by 1000": scaled("Vh", 1000.0, -1),
    "U in another order": lambda t: t["0.factors.U"].copy_(t["0.factors.U"].flip(1)),
    "turned": turned,
}


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis", BASIS_CONFIGS, ids=label)
def test_a_changed_factor_is_refused(basis: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = operated(basis, CORE_CONFIGS[0], dtype=dtype)
    save_adapter(model, tmp_path / "right")
    loaded = load_adapter(plain(dtype), tmp_path / "right", progress=False)
    assert torch.equal(sites(loaded)["0"].factors.U, sites(model)["0"].factors.U)
    for name, fault in FAULTS.items():
        save_adapter(model, tmp_path / name)
        edit_tensors(tmp_path / name, fault)
        assert "its factors are not those of its base weight" in refused(tmp_path / name, plain(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_factors_fit_the_same_weight_in_another_dtype(dtype: torch.dtype, other: torch.dtype, tmp_path: Path) -> None:
    model = operated(BASIS_CONFIGS[0], CORE_CONFIGS[0], dtype=dtype)
    save_adapter(model, tmp_path)
    load_adapter(plain(dtype).to(other), tmp_path, progress=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("decay", [0.0, 3.0, 12.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_every_way_to_factorise_is_accepted(method: Any, shape: tuple[int, int], decay: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    W = ((U * torch.logspace(0, -decay, len(S), dtype=torch.float64)) @ Vh * scale).float()
    variant = resolve_variant(surgery.AntiPaSTO(r=12, svd_method=method), None, None)
    found = variant.factorise(W, 12, None, 0)
    factors = Factors(*(t.float() for t in (found.U, found.S, found.Vh)))
    assert why_not_of(W, factors, variant) is None
    factors.Vh[3] *= -1
    assert why_not_of(W, factors, variant) is not None


def test_a_weight_of_zeros_has_factors_that_fit() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    nn.init.zeros_(model[0].weight)
    surgery.apply_surgery(model, "antipasto", r=4, target_modules="all-linear", progress=False)
    site = sites(model)["0"]
    assert why_not_of(model[0].weight, site.factors, site.variant) is None


def test_an_adapter_beside_a_trained_weight_is_saved_as_that(tmp_path: Path) -> None:
    model = operated(BASIS_CONFIGS[0], CORE_CONFIGS[0])
    x = torch.randn(3, 6, dtype=torch.float64)
    weight = sites(model)["0"].weight.requires_grad_(True)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(x).square().sum().backward()
    optimiser.step()
    weight.requires_grad_(False)
    expected = model(x)
    save_adapter(model, tmp_path)
    base = plain()
    base.load_state_dict({"0.weight": weight, "0.bias": model[0].bias})
    loaded = load_adapter(base, tmp_path, progress=False)
    assert sites(loaded)["0"].record.trained
    assert torch.equal(loaded(x), expected)
    edit_config(tmp_path, lambda config: config["sites"]["0"].update(trained=1))
    base = plain()
    base.load_state_dict({"0.weight": weight, "0.bias": model[0].bias})
    assert "'trained' must be true or false" in refused(tmp_path, base)
    edit_config(tmp_path, lambda config: config["sites"]["0"].update(trained=True))
    edit_tensors(tmp_path, scaled("U", 1000.0))
    assert "U is not orthonormal" in refused(tmp_path, base)
