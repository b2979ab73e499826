"""Weights of a given spectrum, and a model of two sites."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def weight_of(d_out: int, d_in: int, decay: float) -> Tensor:
    """A random weight, its singular values multiplied by ``i^-decay``."""
    W = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(d_out + d_in))
    if not decay:
        return W
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U * (S * torch.arange(1, len(S) + 1) ** -decay)) @ Vh


class TwoLinears(nn.Module):
    """Two sites of unlike shape, as in an MLP."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        """The MLP."""
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]
