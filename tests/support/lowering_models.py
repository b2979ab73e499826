"""One linear site in every lowering, and the same function in float64."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch._dynamo.testing
from torch import Tensor, nn

from surgery import apply_surgery, sites
from surgery.lowerings import REGISTRY
from surgery.variants import REGISTRY as VARIANTS
from tests.support.zoo import built_once

PLAIN = [name for name, cls in VARIANTS.items() if not cls().needs_calibration]
KEPT = [name for name, lowering in REGISTRY.items() if lowering.caches]


def model_of(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=bias), nn.Tanh(), nn.Linear(40, 16, bias=bias)).to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def shake(model: nn.Module, seed: int = 2, size: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in sites(model).values():
            for p in site.core.parameters():
                p.add_(size * torch.randn(p.shape, generator=generator))
    return model


@built_once
def operated(lowering: str, variant: Any = "antipasto", dtype: torch.dtype = torch.float32, **kwargs: Any) -> nn.Module:
    model = model_of(dtype, **kwargs)
    kwargs = {"target_modules": "all-linear", "example_inputs": inputs(dtype), "progress": False}
    apply_surgery(model, variant, r=8, lowering=lowering, **kwargs)
    return shake(model)


@functools.cache
def site_in(form: str) -> Any:
    """A site in a form, of which a lowering is asked."""
    model = apply_surgery(model_of(), "antipasto", r=8, target_modules="all-linear", form=form, progress=False)
    return sites(model)["0"]


def possible(lowering: str, variant: str) -> bool:
    """Whether a lowering says that it fits a variant."""
    site = copy.deepcopy(site_in(REGISTRY[lowering].form))
    site.variant = VARIANTS[variant]()
    return REGISTRY[lowering].why_not(site) is None


def reference(model: nn.Module, x: Tensor) -> Tensor:
    """In float64, by the formula of the design."""
    wide = copy.deepcopy(model).to(torch.float64)
    x = x.to(torch.float64)
    for module in wide:
        site = getattr(module, "sspace", None)
        if site is None:
            x = module(x)
            continue
        f, coeff = site.factors, site.steering.coeff
        coeff = coeff.reshape(-1, *[1] * (x.dim() - 1)) if coeff.dim() else coeff
        d = site.variant.delta(x @ f.Vh.T, f.S, site.core, coeff)
        y = x @ module.weight.T + d @ f.U.T
        x = y if module.bias is None else y + module.bias
    return x
