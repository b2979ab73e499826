"""Cache invalidation: detect whether a tensor has changed since a value was derived from it."""

from __future__ import annotations

from collections.abc import Callable

import torch


def watch(tensor: torch.Tensor, *, by_value: bool) -> Callable[[torch.Tensor], bool]:
    """A function that tells whether a tensor, or the one in its place, still is what this one is now.

    Args:
        by_value: compare values on the CPU, where ``.data`` may be written unnoticed; on an accelerator, where that
            would synchronise, and without, identity and version counter are compared.
    """
    if by_value and tensor.device.type == "cpu":
        value = tensor.detach().clone()
        return lambda now: now.device == value.device and now.dtype == value.dtype and torch.equal(now, value)
    held, version = tensor.detach(), version_of(tensor)  # held, so that no other tensor can come to lie at its address
    address, shape, strides = held.data_ptr(), held.shape, held.stride()
    return lambda now: (
        version_of(now) == version
        and now.data_ptr() == address
        and now.shape == shape
        and now.stride() == strides
        and now.dtype == held.dtype
        and now.device == held.device
    )


def version_of(tensor: torch.Tensor) -> int:
    """The number of in-place writes to a tensor that autograd has counted; 0 of an inference tensor, which has none."""
    return 0 if tensor.is_inference() else tensor._version
