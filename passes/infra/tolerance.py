"""One table of tolerances by dtype, for translation validation, for every export and for the test suite.

Errors are relative to the largest entry of the reference. Single entries deviate by a few per cent after many roundings
in bfloat16, but roundings have no common direction: the scale of the whole tensor (its projection on the reference) is
held within ``SYSTEMATIC`` for every dtype, so that an output that is 1.01 times too large is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """What one dtype allows.

    Attributes:
        relative: the same operations in another order: a few dozen roundings along one model.
        rounded: one rounding of a result that was formed in higher precision.
        elsewhere: another runtime's own kernels, or a model whose stored weights were rounded once more.
    """

    relative: float
    rounded: float
    elsewhere: float


TABLE = {
    torch.float64: Tolerance(relative=1e-12, rounded=1e-14, elsewhere=1e-9),
    torch.float32: Tolerance(relative=1e-5, rounded=1e-6, elsewhere=1e-4),
    torch.bfloat16: Tolerance(relative=4e-2, rounded=8e-3, elsewhere=1e-1),
    torch.float16: Tolerance(relative=5e-3, rounded=1e-3, elsewhere=2e-2),
}
RELATIVE = {dtype: row.relative for dtype, row in TABLE.items()}
ROUNDED = {dtype: row.rounded for dtype, row in TABLE.items()}
ELSEWHERE = {dtype: row.elsewhere for dtype, row in TABLE.items()}

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
