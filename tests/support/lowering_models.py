"""One linear site in every lowering, and the same function in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch._dynamo.testing
from torch import Tensor, nn

from surgery import apply_surgery, sites
from surgery.variants import REGISTRY as VARIANTS

PLAIN = [name for name, cls in VARIANTS.items() if not cls().needs_calibration]
KEPT = {"dense": "changed", "pair": "left"}  # what makes the tensor that is kept


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


def operated(lowering: str, variant: Any = "antipasto", dtype: torch.dtype = torch.float32, **kwargs: Any) -> nn.Module:
    model = model_of(dtype, **kwargs)
    kwargs = {"target_modules": "all-linear", "example_inputs": inputs(dtype), "progress": False}
    apply_surgery(model, variant, r=8, lowering=lowering, **kwargs)
    return shake(model)


def possible(lowering: str, variant: str) -> bool:
    return (lowering != "output" or VARIANTS[variant].of_scaled) and (lowering not in KEPT or VARIANTS[variant].linear)


def reference(model: nn.Module, x: Tensor) -> Tensor:
    """In float64, by the formula of the design."""
    wide = copy.deepcopy(model).to(torch.float64)
    x = x.to(torch.float64)
    for module in wide:
        if not hasattr(module, "factors"):
            x = module(x)
            continue
        f, coeff = module.factors, module.core.coeff
        coeff = coeff.reshape(-1, *[1] * (x.dim() - 1)) if coeff.dim() else coeff
        d = module.variant.delta(x @ f.Vh.T, f.S, module.core, coeff)
        y = x @ module.weight.T + d @ f.U.T
        x = y if module.bias is None else y + module.bias
    return x
