"""The tolerance table refuses what it must."""

from __future__ import annotations

import pytest
import torch

from tests.support.tolerance import RELATIVE, ROUNDED, assert_close


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("rounded", [False, True])
def test_an_output_one_per_cent_too_large_is_refused(dtype: torch.dtype, rounded: bool) -> None:
    reference = torch.randn(7, 50, dtype=torch.float64)
    assert_close(reference.to(dtype), reference, rounded=rounded)
    with pytest.raises(AssertionError, match="error"):
        assert_close((reference * 1.01).to(dtype), reference, rounded=rounded)


def test_another_shape_and_nan_are_refused() -> None:
    with pytest.raises(AssertionError):
        assert_close(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(AssertionError):
        assert_close(torch.full((2,), torch.nan), torch.ones(2))


def test_what_is_rounded_once_is_held_tighter() -> None:
    assert all(ROUNDED[dtype] < RELATIVE[dtype] for dtype in RELATIVE)
