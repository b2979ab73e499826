"""The test suite's view of the one tolerance table."""

from __future__ import annotations

import torch

from passes.infra.tolerance import ELSEWHERE, RELATIVE, ROUNDED, disagreement, relative_error

__all__ = ["ELSEWHERE", "RELATIVE", "ROUNDED", "assert_close", "relative_error"]


def assert_close(
    found: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype | None = None, *, rounded: bool = False
) -> None:
    """Compare full tensors by the table; the dtype is that of ``found`` unless given."""
    assert found.shape == reference.shape, (found.shape, reference.shape)
    problem = disagreement(found, reference, dtype, rounded=rounded)
    assert problem is None, problem
