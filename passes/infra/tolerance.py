"""One table of tolerances by dtype, for translation validation and for the test suite.

Errors are relative to the largest entry of the reference. Single entries deviate by a few per cent after many roundings
in bfloat16, but roundings have no common direction: the scale of the whole tensor (its projection on the reference) is
held within ``SYSTEMATIC`` for every dtype, so that an output that is 1.01 times too large is refused.
"""

from __future__ import annotations

import torch

# a few dozen roundings of the dtype; a product, an addition and a cast along one model
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
# one rounding of a result that was formed in higher precision
ROUNDED = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

SYSTEMATIC = 8e-3


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest deviation over the reference's largest entry, in float64; infinite where shapes differ, or for a NaN."""
    if actual.shape != reference.shape:
        return float("inf")
    actual, reference = (tensor.detach().to("cpu", torch.float64) for tensor in (actual, reference))
    if reference.numel() == 0:
        return 0.0
    error = float((actual - reference).abs().max() / reference.abs().max().clamp(min=1e-300))
    return error if error == error else float("inf")


def disagreement(
    actual: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype | None = None, *, rounded: bool = False
) -> str | None:
    """Compare full tensors by the table.

    Args:
        dtype: whose tolerance holds; that of ``actual`` by default.
        rounded: the result was formed in higher precision and rounded once.

    Returns:
        What is wrong, or None. Tensors of integers and booleans must be equal.
    """
    if actual.shape != reference.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    table = ROUNDED if rounded else RELATIVE
    dtype = dtype or actual.dtype
    if actual.dtype not in table:
        return None if torch.equal(actual, reference) else "values differ"
    special = ~reference.isfinite()
    if special.any():  # infinities and NaNs agree where they are the same
        if not torch.isclose(actual[special], reference[special], rtol=0, atol=0, equal_nan=True).all():
            return "infinities or NaNs differ"
        actual, reference = actual.masked_fill(special, 0.0), reference.masked_fill(special, 0.0)
    error, limit = relative_error(actual, reference), table[dtype]
    if not error <= limit:
        return f"relative error {error:.3g} exceeds {limit:.3g}"
    scale = reference.detach().abs().max().to(torch.float64).clamp(min=1e-300) if reference.numel() else 0.0
    x, y = (tensor.detach().to(torch.float64).flatten() / scale for tensor in (actual, reference))
    if y.numel() and y.abs().max() >= 0.5:  # zeros, or values below float64's range, have none
        gain = float((x @ y) / (y @ y)) - 1
        if abs(gain) >= SYSTEMATIC:
            return f"scale error: the result is {1 + gain:.4f} times the reference"
    return None
