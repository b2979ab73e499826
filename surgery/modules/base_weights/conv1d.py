"""``conv1d``: the weight of GPT-2's ``Conv1D``, or of ``x @ w``, ``(d_in, d_out)``."""

from __future__ import annotations

import torch

from surgery.modules.base_weights import BaseWeight, is_plain


class Conv1D(BaseWeight):
    """A matrix that is stored transposed."""

    kind = "conv1d"

    @classmethod
    def accepts(
        cls, parameter: torch.Tensor, layout: str, matrix_shape: tuple[int, ...], rows: tuple[int, int] | None
    ) -> bool:
        """One matrix, transposed."""
        return rows is None and len(matrix_shape) == 2 and layout == "in_out" and is_plain(parameter)
