"""Cores of normal values, and what their delta gives and should give."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from surgery.modules.core import Core
from surgery.variants import Variant
from tests.support.reference import array, reference_delta

F64 = torch.float64


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def core_of(config: Variant, r: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = F64) -> Core:
    """A core of normal values of a given scale."""
    core = Core(config.init_core(r, torch.Generator().manual_seed(0)), dtype, torch.device("cpu"), config.frozen)
    with torch.no_grad():
        for i, parameter in enumerate(core.parameters()):
            parameter.copy_(scale * some(*parameter.shape, seed=seed + i))
    return core


def delta(config: Variant, h: torch.Tensor, S: torch.Tensor, core: Any, coeff: float) -> torch.Tensor:
    return config.delta(h, S, core, torch.tensor(coeff, dtype=S.dtype)).detach()


def expected_delta(config: Variant, h: torch.Tensor, S: torch.Tensor, core: Core, coeff: float) -> torch.Tensor:
    stored = {name: array(tensor) for name, tensor in core.tensors().items()}
    return torch.from_numpy(reference_delta(config, array(h), array(S), stored, float(np.float64(coeff))))
