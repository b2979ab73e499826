"""Data for variants that choose their factors by some: batches, or two sets that differ."""

from __future__ import annotations

from typing import Any

import torch

import surgery
from passes.ir.torch_internals import tree_map_only
from surgery.variants import Variant, resolve_variant


def calibration_for(variant: str | Variant, inputs: Any) -> Any:
    """What ``apply_surgery(calibration=)`` of a variant takes, made of a batch; None where it needs nothing.

    The other side of a contrast is the batch itself in reverse order, doubled where it is no batch of token ids.
    """
    config = resolve_variant(variant)
    if not config.needs_calibration:
        return None
    if config.statistic != "contrast":
        return [inputs, inputs]
    return surgery.Contrast([inputs], [tree_map_only(torch.Tensor, _other, inputs)])


def _other(tensor: torch.Tensor) -> torch.Tensor:
    """Another side: other numbers, or the token ids read from the end."""
    return tensor.flip(0) * 2 if tensor.is_floating_point() else tensor.flip(-1)
