"""``plain``: the weight of an ``nn.Linear``, ``(d_out, d_in)`` floating-point numbers."""

from __future__ import annotations

import torch

from surgery.modules.base_weights import BaseWeight, is_plain


class Plain(BaseWeight):
    """A matrix as ``F.linear`` takes it."""

    kind = "plain"

    @classmethod
    def accepts(
        cls, parameter: torch.Tensor, layout: str, matrix_shape: tuple[int, ...], rows: tuple[int, int] | None
    ) -> bool:
        """One matrix, in the layout of ``nn.Linear``."""
        one = len(matrix_shape) == 2 and layout == "out_in" and parameter.dim() == 2
        return rows is None and one and is_plain(parameter)
