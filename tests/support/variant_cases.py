"""Every registered variant with each of its switches turned, a core of it, and an input in S-space."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import surgery
from passes.analysis.linear_sites import Site
from surgery.factors.svd import factorise
from surgery.hosting.attach import AdapterPlan, attach
from surgery.modules.adapter import Adapter
from surgery.modules.core import Core, Factors
from surgery.variants import REGISTRY, Variant

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
R, D_IN, D_OUT = 8, 12, 10


def configurations() -> list[Variant]:
    """Every registered variant as it is by default, and once more for each of its switches turned."""
    default = [cls() for cls in REGISTRY.values()]
    switches = [(v, f.name) for v in default for f in dataclasses.fields(v) if isinstance(getattr(v, f.name), bool)]
    return default + [dataclasses.replace(v, **{name: not getattr(v, name)}) for v, name in switches]


VARIANTS = configurations()
each_variant = pytest.mark.parametrize(
    "variant",
    VARIANTS,
    ids=lambda v: v.name + "".join(f",{k}={x}" for k, x in v.hyperparameters().items() if x != getattr(type(v)(), k)),
)


def core_of(variant: Variant, *, r: int = R, scale: float = 0.0, dtype: torch.dtype = torch.float32) -> Core:
    """A core at its initial value, or moved away from it by normal noise of a given scale."""
    tensors, generator = variant.init_core(r, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    frozen = {name: nn.functional.normalize(torch.randn(r, generator=generator), dim=0) for name in variant.frozen}
    core = Core(tensors | frozen, dtype, torch.device("cpu"), variant.frozen)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(dtype)
        if scale and hasattr(core, "alpha"):  # strengths are clamped to [0, 1]
            core.alpha.copy_(torch.linspace(0.3, 0.7, len(core.alpha)))
    return core


def s_space(dtype: torch.dtype = torch.float32, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An input in S-space and descending singular values in the core's dtype."""
    S = torch.linspace(3.0, 0.1, R, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return torch.randn(*(shape or (3, 4)), R).to(dtype), S


def adapted(variant: Variant, scale: float) -> tuple[nn.Linear, Adapter]:
    """A float64 linear module, and the same one with an adapter on it."""
    base = nn.Linear(D_IN, D_OUT).double()
    model = nn.Sequential(nn.Linear(D_IN, D_OUT).double())
    model.load_state_dict({f"0.{name}": tensor for name, tensor in base.state_dict().items()})
    found = factorise(base.weight, R)
    core = core_of(variant, scale=scale, dtype=torch.float64)
    site = Site("0", "0.weight", "0.bias", "out_in", D_OUT, D_IN)
    attach(model, AdapterPlan(site, "module", variant, Factors(found.U, found.S, found.Vh), core))
    return base, surgery.sites(model)["0"]
