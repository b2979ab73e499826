"""The one tolerance table of the test suite: relative to the largest entry of the reference, by dtype.

Single entries deviate by a few per cent after many roundings in bfloat16, but roundings have no common direction: the
scale of the whole tensor (its projection on the reference) is held within ``SYSTEMATIC`` for every dtype, so that an
output that is 1.01 times too large is refused.
"""

from __future__ import annotations

import torch

# a few dozen roundings of the dtype; a product, an addition and a cast along one model
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
# one rounding of a result that was formed in higher precision
ROUNDED = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

SYSTEMATIC = 8e-3


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest deviation over the largest entry of the reference, in float64, on full tensors."""
    assert found.shape == reference.shape, (found.shape, reference.shape)
    reference = reference.detach().to(torch.float64)
    scale = reference.abs().max().clamp(min=1e-300)
    return float((found.detach().to(torch.float64) - reference).abs().max() / scale)


def assert_close(
    found: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype | None = None, *, rounded: bool = False
) -> None:
    """Compare full tensors by the table; the dtype is that of ``found`` unless given."""
    limit = (ROUNDED if rounded else RELATIVE)[dtype or found.dtype]
    error = relative_error(found, reference)
    assert error <= limit, f"relative error {error:.3g} exceeds {limit:.3g}"
    scale = reference.detach().abs().max().to(torch.float64).clamp(min=1e-300)
    x, y = (tensor.detach().to(torch.float64).flatten() / scale for tensor in (found, reference))
    if y.abs().max() >= 0.5:  # a reference of zeros, or below float64's range, has no scale
        gain = float((x @ y) / (y @ y)) - 1
        assert abs(gain) < SYSTEMATIC, f"scale error: the result is {1 + gain:.4f} times the reference"
