"""Tell plain linear modules, whose forward is one product, from all others."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def linear_layout(module: nn.Module) -> str | None:
    """Tell how a plain linear module stores its weight: "out_in", "in_out" (GPT-2's Conv1D), or None if it is none.

    A subclass counts only while it keeps the forward of its base, since any other forward may do more than the product.
    """
    return None if "forward" in vars(module) else layout_of_forward(type(module).forward)


def layout_of_forward(forward: Callable[..., object]) -> str | None:
    """The layout of the weight that a plain linear forward multiplies by, or None."""
    if forward is nn.Linear.forward:
        return "out_in"
    if forward.__module__ == "transformers.pytorch_utils" and forward.__qualname__ == "Conv1D.forward":
        return "in_out"
    return None
