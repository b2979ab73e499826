"""One small model for each kind of base weight; the file of a kind may have one of its own, ``example()``."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from surgery.modules.base_weights import KINDS

SIZE = 12
X = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(1))


class Transposed(nn.Module):
    """A weight that is stored as ``(d_in, d_out)``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(SIZE, 7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ self.w


class Experts(nn.Module):
    """All experts on every row."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 7, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.w.transpose(1, 2)).sum(dim=0)


class Attention(nn.Module):
    """Query, key and value in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x)[0]
        return found


EXAMPLES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(SIZE, 9), nn.Tanh(), nn.Linear(9, 7)),
    "conv1d": Transposed,
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (3, SIZE // 3)), nn.Conv1d(3, 8, 2), nn.Flatten()),
    "stacked": Experts,
    "packed": Attention,
}

PARTS = {"packed": ["attention.in_proj_weight.q", "attention.in_proj_weight.v"]}  # instead of all sites


def model_of(kind: str) -> nn.Module:
    """The same model each time, in eval mode."""
    torch.manual_seed(0)
    made = EXAMPLES.get(kind) or sys.modules[KINDS[kind].__module__].example
    model: nn.Module = made()
    return model.eval()


def input_of(kind: str) -> Tensor:
    """What the model takes."""
    return X[None] if kind == "packed" else X
