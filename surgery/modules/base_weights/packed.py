"""``packed``: q, k or v in the ``in_proj_weight`` of ``nn.MultiheadAttention``, some rows of one parameter."""

from __future__ import annotations

import torch

from surgery.modules.base_weights import BaseWeight, is_plain


class Packed(BaseWeight):
    """Some rows of a packed weight."""

    kind = "packed"

    @classmethod
    def accepts(
        cls, parameter: torch.Tensor, layout: str, matrix_shape: tuple[int, ...], rows: tuple[int, int] | None
    ) -> bool:
        """A part."""
        return rows is not None and is_plain(parameter)

    def tensor(self) -> torch.Tensor:
        """The rows, a view."""
        assert self.rows is not None
        return self.reader.parameter()[self.rows[0] : self.rows[1]]

    @property
    def shape(self) -> torch.Size:
        """Without slicing, which a trace would see."""
        return torch.Size(self.matrix_shape)
