"""An attention whose query, key and value weights are one parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from surgery import apply_surgery
from tests.support.lowering_models import shake

E = 16
X = torch.randn(2, 5, E, generator=torch.Generator().manual_seed(3))
MEMORY = torch.randn(2, 7, E, generator=torch.Generator().manual_seed(4))
CALLS = {"self": (X, X, X), "memory": (X, MEMORY, MEMORY), "three": (X, MEMORY, torch.tanh(MEMORY))}
QV = ["in_proj_weight.q", "in_proj_weight.v"]


def attention(dtype: torch.dtype = torch.float32) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    found = nn.MultiheadAttention(E, 4, batch_first=True).to(dtype).eval()
    nn.init.normal_(found.in_proj_bias, std=0.3)
    return found


def operated(call: str = "self", variant: Any = "antipasto", targets: Any = QV, **options: Any) -> nn.Module:
    options = {"example_inputs": CALLS[call], "progress": False, **options}
    return shake(apply_surgery(attention(), variant, r=6, target_modules=targets, **options))
