"""Coefficients of rows and tokens at a site: its input is seen with one leading entry for each value.

So a core is given (n, ..., r) and coefficients (n, 1, ..., 1), wherever in the input the rows lie; and what it computes
from a coefficient, as a gain or a rotation, it computes once per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from passes.errors import InputError

Restore = Callable[[torch.Tensor], torch.Tensor]
WAY_OUT = "leave the site out with exclude_modules, or use a scalar coeff"


class RowLayout(NamedTuple):
    """Which entries of a site's input belong to which row of the batch, as it was measured.

    Attributes:
        dim: the dimension that the rows lie along.
        kind: "entries" (one for each row), "blocks" (k neighbours for each), or "cycles" (all rows, k times in turn).
    """

    dim: int
    kind: Literal["entries", "blocks", "cycles"]


class RowsFirst(NamedTuple):
    """An input with its coefficients.

    Attributes:
        h: (n, ..., r).
        coeff: (n, 1, ..., 1), or all of size 1, with as many dimensions.
        restore: puts a result in the shape of h, in that of the input; None where that is the same.
    """

    h: torch.Tensor
    coeff: torch.Tensor
    restore: Restore | None


def by_rows(
    coeff: torch.Tensor, h: torch.Tensor, layout: RowLayout | str | None, *, rows: str, known: bool, key: str
) -> RowsFirst:
    """See an input with one leading entry for each value of a coefficient of rows or tokens.

    Args:
        coeff: (rows,), or (rows, positions).
        h: (..., r).
        layout: where the rows lie; a sentence that says why it is not known; None before it was measured.
        rows: "exact", "repeat" or "tile".
        known: whether the rows are those of the present call, which the root has seen; else they are those that were
            set, and a part of the model is called by itself.
        key: of the site, for errors.

    Raises:
        InputError: the coefficient does not fit, or the rows of the site are not known.
    """
    if coeff.shape == (1,):
        return RowsFirst(h, coeff.reshape([1] * h.dim()), None)
    if isinstance(layout, str):
        raise InputError(f"site {key!r}: {layout}; {WAY_OUT}")
    if coeff.dim() == 2:
        return _by_tokens(coeff, h, layout, key)
    if layout is None:
        raise InputError(
            f"site {key!r}: which of its inputs belong to which row has not been measured, which a call of the whole "
            f"model does; call that first, {WAY_OUT}"
        )
    count, dim = coeff.shape[0], layout.dim
    if not _fits(count, h, layout, rows, known):
        raise InputError(
            f"site {key!r}: coeff has {count} rows, which lie as {layout.kind} along dimension {dim}, but its input "
            f"has shape {(*h.shape[:-1], 'd_in')}; see rows= of set_coeff ('repeat' for beams, 'tile' for guidance), "
            "or leave the site out with exclude_modules"
        )
    share = h.shape[dim] // count
    seen, restore = h, None
    if h.shape[dim] == count:
        if dim:
            seen, restore = _first(h, dim)
    elif layout.kind == "cycles" or (layout.kind == "entries" and rows == "tile"):
        seen, restore = _first(h.unflatten(dim, (share, count)), dim + 1, dim)
    else:
        seen, restore = _first(h.unflatten(dim, (count, share)), dim, dim)
    return RowsFirst(seen, coeff.reshape(-1, *[1] * (seen.dim() - 1)), restore)


def _first(h: torch.Tensor, dim: int, flat: int | None = None) -> tuple[torch.Tensor, Restore]:
    """Move a dimension to the front; the way back, after which two dimensions from ``flat`` on become one again."""

    def restore(d: torch.Tensor) -> torch.Tensor:
        back = d.movedim(0, dim) if dim else d
        return back if flat is None else back.flatten(flat, flat + 1)

    return h.movedim(dim, 0) if dim else h, restore


def _fits(count: int, h: torch.Tensor, layout: RowLayout, rows: str, known: bool) -> bool:
    """Whether an input can be made of so many rows."""
    if h.dim() - 1 <= layout.dim or h.shape[layout.dim] % count:
        return False
    if h.shape[layout.dim] == count:
        return True
    if known:
        return layout.kind != "entries"
    if layout.kind == "entries":
        return rows != "exact"
    # of a part that is called by itself the batch is not known: only what does not depend on it
    return rows != ("tile" if layout.kind == "blocks" else "repeat")


def _by_tokens(coeff: torch.Tensor, h: torch.Tensor, layout: RowLayout | None, key: str) -> RowsFirst:
    """See an input (batch, positions, ...), (positions, batch, ...), or one of both flattened, with one leading entry
    for each token.
    """
    batch, positions = coeff.shape
    if layout is not None and layout.dim == 1 and h.dim() >= 3:
        seen, each, restore = _by_tokens(coeff, h.transpose(0, 1), RowLayout(0, layout.kind), key)
        assert restore is not None
        return RowsFirst(seen, each, lambda d: restore(d).transpose(0, 1))
    if h.dim() == 2 and 1 not in coeff.shape and h.shape[0] == batch * positions:
        in_turn = layout is not None and layout.kind == "cycles"
        return RowsFirst(h, (coeff.T if in_turn else coeff).reshape(-1, 1), None)
    fits = h.dim() >= 3 and (layout is None or layout == (0, "entries"))
    if fits and (h.shape[0] == batch or batch == 1) and (h.shape[1] == positions or positions == 1):
        lead = h.shape[:2]
        each = coeff.expand(lead).reshape(-1, *[1] * (h.dim() - 2))
        return RowsFirst(h.flatten(0, 1), each, lambda d: d.unflatten(0, lead))
    raise InputError(
        f"site {key!r}: coeff is given for {batch} rows of {positions} positions in this call, but its input has shape "
        f"{(*h.shape[:-1], 'd_in')}; leave the site out with exclude_modules"
    )
