"""Operated models whose cores ONNX Runtime can swap."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from surgery import Contrast, apply_surgery, sites
from surgery.variants import REGISTRY, Variant
from tests.support.zoo import SmallModel, built_once, small_model


@torch.no_grad()
def train(model: nn.Module, seed: int) -> None:
    """Move every core tensor, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for site in sites(model).values():
        for tensor in site.core.tensors().values():
            tensor += torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.3


def calibration(p: SmallModel, variant: Variant) -> Any:
    if variant.statistic == "contrast":
        return Contrast([p.inputs], [torch.randn_like(p.inputs) * 2 + 1])
    return [p.inputs, torch.randn_like(p.inputs)]


@built_once
def with_variant(variant: str | Variant, name: str = "mlp", *, r: int = 4, seed: int = 1) -> SmallModel:
    p = small_model(name)
    config = REGISTRY[variant]() if isinstance(variant, str) else variant
    data = calibration(p, config) if config.needs_calibration else None
    targets = "all-linear"
    apply_surgery(
        p.model, config, r=r, target_modules=targets, example_inputs=p.inputs, calibration=data, progress=False
    )
    train(p.model, seed)
    return p
