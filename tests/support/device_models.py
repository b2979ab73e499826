"""Operated models on a device that is not the CPU."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from surgery import (
    apply_surgery,
    sites,
)
from tests.support.calibration_data import calibration_for
from tests.support.zoo import SmallModel, small_model


def on(device: torch.device, given: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), given)


def there(device: torch.device, name: str = "mlp", dtype: torch.dtype = torch.float32) -> SmallModel:
    """A small model on the accelerator."""
    found = small_model(name, dtype)
    model = found.model.to(device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # a move to a device that is not one of torch's own unties them
    return SmallModel(name, model, on(device, found.inputs))


def operated(found: SmallModel, variant: str = "antipasto", r: int = 4, **kwargs: Any) -> SmallModel:
    """The model with a core away from its start."""
    kwargs = {"target_modules": "all-linear", "calibration": calibration_for(variant, found.inputs), **kwargs}
    apply_surgery(found.model, variant, r=r, example_inputs=found.inputs, progress=False, **kwargs)
    with torch.no_grad():
        for i, site in enumerate(sites(found.model).values()):
            for j, p in enumerate(site.core.parameters()):
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + j), dtype=p.dtype)
                p.add_(0.3 * noise.to(p.device))
    return found


def all_on(model: nn.Module, device: torch.device) -> None:
    """No tensor of the model is anywhere else."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    elsewhere = [name for name, tensor in tensors.items() if tensor.device.type != device.type]
    assert not elsewhere, elsewhere


NAME = os.environ.get("DEVICE", "standin")
