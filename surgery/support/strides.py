"""Tensors that lie in memory as others do: another layout may be multiplied by another kernel, to other bits."""

from __future__ import annotations

import torch


def laid_out_like(made: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """A tensor with the strides of another of its shape, whose entries do not overlap; a copy unless it has them."""
    if not torch.compiler.is_compiling() and stored.is_neg():  # a conjugate's imaginary part: a copy is multiplied
        stored = stored.resolve_neg()
    if made.stride() == stored.stride():
        return made
    return torch.empty_strided(stored.shape, stored.stride(), dtype=made.dtype, device=made.device).copy_(made)


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether entries of a tensor may be one and the same in memory, as those of an expanded one are."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    reach = 0  # of the dimensions of smaller stride
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False
