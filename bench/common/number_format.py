"""How numbers are written in tables."""

from __future__ import annotations


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, and at most two decimals unless it is small."""
    if value is None:
        return "n/a"
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) < 1 else f"{value:.{digits - len(str(int(abs(value))))}f}"
