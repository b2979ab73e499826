"""Operated models to export as programs."""

from __future__ import annotations

from typing import Any

import torch

import surgery
from surgery import (
    apply_surgery,
    sites,
)
from surgery.variants import REGISTRY
from tests.support.zoo import SmallModel, built_once, small_model


def first(program: Any, inputs: Any) -> torch.Tensor:
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    with torch.no_grad():
        out = program(*args, **kwargs)
    out = next(iter(out.values())) if isinstance(out, dict) else out
    return out if isinstance(out, torch.Tensor) else out[0]


def shaken(p: SmallModel, seed: int = 2, scale: float = 0.2) -> SmallModel:
    """The model with other cores."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in sites(p.model).values():
            for parameter in site.core.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return p


@built_once
def with_variant(name: str, dtype: torch.dtype = torch.float32) -> SmallModel:
    """An ``mlp`` with a variant whose core is not at identity."""
    p, config = small_model("mlp", dtype), REGISTRY[name](r=4)
    generator = torch.Generator().manual_seed(0)
    data: Any = [torch.randn(4, 16, 12, generator=generator).to(dtype) + shift for shift in (0, 1)]
    data = surgery.Contrast(data[:1], data[1:]) if config.statistic == "contrast" else data
    apply_surgery(
        p.model, config, target_modules="all-linear", example_inputs=p.inputs, progress=False,
        calibration=data if config.needs_calibration else None,
    )  # fmt: skip
    return shaken(p)
