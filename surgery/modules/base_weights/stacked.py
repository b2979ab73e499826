"""``stacked``: the weights of all experts in one parameter, ``(experts, d_out, d_in)`` or transposed."""

from __future__ import annotations

import torch

from surgery.modules.base_weights import BaseWeight, is_plain


class Stacked(BaseWeight):
    """A stack of matrices, each of which has factors and a core of its own."""

    kind = "stacked"

    @classmethod
    def accepts(
        cls, parameter: torch.Tensor, layout: str, matrix_shape: tuple[int, ...], rows: tuple[int, int] | None
    ) -> bool:
        """Several matrices."""
        return rows is None and len(matrix_shape) == 3 and is_plain(parameter)
