"""Small models as people write them, operated on, with cores away from where they start."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from surgery import apply_surgery, sites

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two linear modules and a weight that is read."""

    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8) if first is None else first
        self.b = nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x))) @ self.w


def operated(model: nn.Module) -> nn.Module:
    model.eval()
    apply_surgery(model, "antipasto", r=4, target_modules="all-linear", example_inputs=X, progress=False)
    with torch.no_grad():
        for site in sites(model).values():
            site.core.g.add_(torch.linspace(-0.4, 0.5, len(site.core.g)))
    return model


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(X)
    return found


class Own(nn.Linear):
    """A forward of its own, which is the product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class TwoPaths(nn.Module):
    """Calls its head, or reads the weight of it; asks for the weight's dtype on both paths."""

    def __init__(self, kind: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.head = kind(8, 6)

    def forward(self, x: torch.Tensor, read: bool = False, penalty: bool = False) -> torch.Tensor:
        x = x.to(self.head.weight.dtype)[:, : self.head.weight.shape[1]]
        y = x @ self.head.weight.T + self.head.bias if read else self.head(x)
        return y + self.head.weight.norm() if penalty else y


def two_paths(kind: type[nn.Linear] = nn.Linear, variant: Any = "antipasto", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = TwoPaths(kind).eval()
    options = {"r": 4, "target_modules": "all-linear", "example_inputs": X, "progress": False, **options}
    return apply_surgery(model, variant, **options)
