"""What ``package.module:callable`` can name on a command line."""

from __future__ import annotations

import torch
from torch import nn


def tiny() -> tuple[nn.Module, torch.Tensor]:
    """A module and its inputs, for ``package.module:callable``."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), torch.zeros(2, 6)


def no_model() -> int:
    return 3
