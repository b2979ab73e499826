"""Small models that the cost report's processes load by name; nothing heavy is imported for them."""

from __future__ import annotations

import os
import signal

import torch
from torch import nn


class Residual(nn.Module):
    """Two linear modules around a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Deadly(Residual):
    """Ends its process once it is operated on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(self.up) is not nn.Linear:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def residual() -> tuple[nn.Module, torch.Tensor]:
    return Residual(), torch.randn(2, 6, 16)


def deadly() -> tuple[nn.Module, torch.Tensor]:
    return Deadly(), torch.randn(2, 6, 16)
