"""The example inputs of a captured graph."""

from __future__ import annotations

from typing import Any

import torch


def inputs_of(name: str, batch: int, length: int) -> Any:
    generator = torch.Generator().manual_seed(batch)
    if name == "mlp" or name == "raw":
        return torch.randn(batch, 12, generator=generator)
    if name == "attention":
        return (torch.randn(batch, length, 16, generator=generator),) * 3
    if name == "encoder_layer":
        return torch.randn(batch, length, 16, generator=generator)
    ids = torch.randint(0, 64, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
