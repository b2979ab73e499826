"""Tell whether a tensor still is what it was when something was made from it."""

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
        return lambda now: (now.device, now.dtype) == (value.device, value.dtype) and torch.equal(now, value)
    mark = _mark(tensor)
    held = tensor.detach()  # as long as it is held, no other tensor can come to lie at its address
    return lambda now: held is not None and _mark(now) == mark


def _mark(tensor: torch.Tensor) -> tuple[object, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()
