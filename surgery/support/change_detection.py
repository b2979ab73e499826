"""Cache invalidation: what tells that a tensor was written to."""

from __future__ import annotations

import torch


def version_of(tensor: torch.Tensor) -> int:
    """The number of in-place writes to a tensor that autograd has counted; 0 of an inference tensor, which has none."""
    return 0 if tensor.is_inference() else tensor._version


def address_of(tensor: torch.Tensor) -> int:
    """Where the entries of a tensor are; 0 of a tensor that has no memory of its own."""
    try:
        return tensor.data_ptr()
    except RuntimeError:  # some tensor subclasses
        return 0
