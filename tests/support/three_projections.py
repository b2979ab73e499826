"""A model of three projections of one input, by a name that a command line takes."""

from __future__ import annotations

import torch
from torch import nn


class Attention(nn.Module):
    """Three projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)


def model() -> tuple[nn.Module, torch.Tensor]:
    return Attention(), torch.randn(1, 8, 16)
