"""Logits of a causal language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def frozen_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits with every parameter frozen, since flags choose kernels."""
    model.requires_grad_(False)
    found = logits(model, tokens)
    model.requires_grad_(True)
    return found
