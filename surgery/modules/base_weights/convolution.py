"""``convolution``: the weight of a convolution, ``(d_out, channels, *kernel)``, a matrix for unfolded inputs."""

from __future__ import annotations

import torch

from surgery.modules.base_weights import BaseWeight, is_plain


class Convolution(BaseWeight):
    """A matrix whose columns are the entries of a kernel."""

    kind = "convolution"

    @classmethod
    def accepts(
        cls, parameter: torch.Tensor, layout: str, matrix_shape: tuple[int, ...], rows: tuple[int, int] | None
    ) -> bool:
        """One matrix, of a parameter with more dimensions."""
        unfolded = len(matrix_shape) == 2 and layout == "out_in" and parameter.dim() > 2
        return rows is None and unfolded and is_plain(parameter)
