"""Every basis, every core and every pair of them that can be, and one small site to put them on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.bases import REGISTRY as BASES
from surgery.bases import Basis
from surgery.bases.corda import CorDA
from surgery.bases.top_svd import SVD
from surgery.cores import REGISTRY as CORES
from surgery.cores import CoreConfig
from surgery.cores.contrast_scale import ContrastScale
from surgery.cores.gated import Gated
from surgery.factors.statistic import Statistic
from surgery.variants import BasisCore

F64 = torch.float64
D_OUT, D_IN, R = 8, 6, 5


def configurations(registry: dict[str, Any]) -> list[Any]:
    """Every registered class as it is by default, once for each of its switches turned, and once with small numbers."""
    found = []
    for default in (cls() for cls in registry.values()):
        values = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
        found.append(default)
        switches = [name for name, value in values.items() if isinstance(value, bool)]
        found += [dataclasses.replace(default, **{name: not values[name]}) for name in switches]
        small = {name: 2 for name, value in values.items() if type(value) is int}
        found += [dataclasses.replace(default, **small)] if small else []
    return found


def label(configuration: Any) -> str:
    changed = {k: v for k, v in vars(configuration).items() if v != getattr(type(configuration)(), k)}
    return configuration.name + "".join(f",{k}={v}" for k, v in changed.items())


GATES = [Gated(gate="abs"), Gated(gate="abs", center=True), Gated(gate="norm"), Gated(gate="none")]
CORE_CONFIGS: list[CoreConfig] = [*configurations(CORES), *GATES, ContrastScale(scale=3.0)]
BASIS_CONFIGS: list[Basis] = [*configurations(BASES), SVD(pool="mean_abs"), CorDA(cov_eps=0.1)]
PAIRS = [(basis, core) for basis in BASIS_CONFIGS for core in CORE_CONFIGS]
POSSIBLE = [
    # settings of a basis that are not its defaults meet one core in the fast lane
    pytest.param(basis, core, marks=[] if basis == type(basis)() or core == CORE_CONFIGS[0] else pytest.mark.full)
    for basis, core in PAIRS
    if core.needs <= basis.gives
]
REFUSED = [(basis, core) for basis, core in PAIRS if not core.needs <= basis.gives]

each_core = pytest.mark.parametrize("core", CORE_CONFIGS, ids=label)
each_basis = pytest.mark.parametrize("basis", BASIS_CONFIGS, ids=label)
each_pair = pytest.mark.parametrize(("basis", "core"), POSSIBLE, ids=lambda c: label(c))


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def data_of(basis: Basis, dtype: torch.dtype = F64) -> Any:
    """Data of channels of unlike size, and two sets for a contrast."""
    batches = [(some(4, 3, D_IN, seed=seed) * torch.linspace(0.3, 2, D_IN, dtype=F64)).to(dtype) for seed in range(4)]
    return surgery.Contrast([b + 1 for b in batches[:2]], batches[2:]) if basis.statistic == "contrast" else batches


def plain(dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, D_OUT)).to(dtype).eval().requires_grad_(False)


def operated(basis: Basis, core: CoreConfig, model: Any = None, dtype: torch.dtype = F64, **options: Any) -> Any:
    return surgery.apply_surgery(
        plain(dtype) if model is None else model,
        BasisCore(r=R, core=core),
        basis=basis,
        target_modules="all-linear",
        calibration=data_of(basis, dtype),
        example_inputs=some(4, 3, D_IN).to(dtype),
        progress=False,
        **options,
    )


def moved(model: Any, scale: float = 0.7) -> Any:
    """The model, its cores away from where they start; strengths of an ablation inside of [0, 1]."""
    with torch.no_grad():
        for i, (name, p) in enumerate(surgery.sites(model)["0"].core.named_parameters()):
            p.copy_(torch.linspace(0.3, 0.7, len(p)) if name == "alpha" else scale * some(*p.shape, seed=20 + i))
    return model


def inputs(dtype: torch.dtype = F64) -> torch.Tensor:
    return some(4, 5, D_IN, seed=11).to(dtype)


def statistic_of(basis: Basis, weight: torch.Tensor) -> Statistic:
    """What calibration would collect of an input."""
    product = None
    if basis.statistic == "absolute":
        _, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        product = S[:, None] * Vh
    found = Statistic(basis.statistic, "input" if product is None else "output", weight.shape[1], product)
    for seed, name in enumerate(("positive", "negative") if basis.statistic == "contrast" else ("all",)):
        found.add(
            some(40, weight.shape[1], seed=seed) * torch.linspace(0.3, 2, weight.shape[1], dtype=F64) + seed, name
        )
    return found
