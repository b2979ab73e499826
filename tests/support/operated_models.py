"""Models of the zoo after surgery, their cores at random values, and the same function in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from surgery import apply_surgery, sites
from tests.support.zoo import ALL_NAMES, SmallModel, built_once, small_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_model = pytest.mark.parametrize("name", ALL_NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def randomise(model: nn.Module, scale: float = 1.0) -> nn.Module:
    """Give every core normal values, always the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in sites(model).values():
            for parameter in site.core.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def operate(found: SmallModel, **options: Any) -> SmallModel:
    """Operate on a model, knowing its inputs."""
    options = {"variant": "antipasto", "r": 16, "example_inputs": found.inputs, "progress": False, **options}
    assert apply_surgery(found.model, **options) is found.model
    return found


@built_once
def _operated(name: str, dtype: torch.dtype) -> SmallModel:
    return operate(small_model(name, dtype))


def operated(name: str, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> SmallModel:
    """A model after surgery, its cores at random values."""
    found = _operated(name, dtype)
    randomise(found.model, scale)
    return found


def reference(found: SmallModel, dtype: torch.dtype, coeff: float = 1.0) -> nn.Module:
    """The base in float64 with ``W + U diag(S elu(coeff g)) Vh`` in place of the weight of each operated site."""
    base = small_model(found.name, dtype).model.double()
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        for key, site in sites(found.model).items():
            U, S, Vh = (tensor.double() for tensor in (site.factors.U, site.factors.S, site.factors.Vh))
            delta = U * (S * F.elu(coeff * site.core.g.double())) @ Vh
            weight = parameters.get(key, parameters.get(f"{key}.weight"))
            weight.add_((delta if site.layout == "out_in" else delta.T).reshape(weight.shape))
    return base


def frozen(name: str, dtype: torch.dtype = torch.float32) -> SmallModel:
    """A model as it is before surgery, without trainable parameters."""
    found = small_model(name, dtype)
    found.model.requires_grad_(False)
    return found
