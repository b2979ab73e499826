"""Shape coefficients of rows and tokens to the input of a site."""

from __future__ import annotations

import torch

from passes.errors import InputError


def shaped_like(coeff: torch.Tensor, h: torch.Tensor, *, rows: str, known: bool, key: str) -> torch.Tensor:
    """Shape a coefficient of rows or tokens to multiply h.

    Args:
        coeff: (batch,), or (batch, positions).
        h: (batch, ..., r), or row-major flattened, (batch * n, ..., r).
        rows: "exact", "repeat" or "tile".
        known: whether the rows are those of the present call, which the root has seen; else they are those that were
            set, and a part of the model is called by itself.
        key: of the site, for errors.

    Returns:
        (rows, 1, ..., 1) or (batch, positions, 1, ...) with as many dimensions as h.

    Raises:
        InputError: the coefficient does not fit.
    """
    return _tokens(coeff, h, key) if coeff.dim() == 2 else _rows(coeff, h, rows, known, key)


def _rows(coeff: torch.Tensor, h: torch.Tensor, rows: str, known: bool, key: str) -> torch.Tensor:
    count, size = coeff.shape[0], h.shape[0]
    if count == 1:
        return coeff.reshape([1] * h.dim())
    flat = h.dim() == 2
    fits = h.dim() > 1 and size % count == 0 and (known or flat or rows != "exact" or size == count)
    if not fits or (rows == "tile" and not known and (flat or size == count) and size != count):
        raise InputError(
            f"site {key!r}: coeff has {count} rows, but its input has shape {(*h.shape[:-1], 'd_in')}; "
            "see rows= of set_coeff ('repeat' for beams, 'tile' for guidance)"
        )
    if size != count:
        tiled = rows == "tile" and not known
        coeff = coeff.repeat(size // count) if tiled else coeff[:, None].expand(count, size // count)
    return coeff.reshape(-1, *[1] * (h.dim() - 1))


def _tokens(coeff: torch.Tensor, h: torch.Tensor, key: str) -> torch.Tensor:
    batch, positions = coeff.shape
    if h.dim() >= 3 and (h.shape[1] == positions or positions == 1) and (h.shape[0] == batch or batch == 1):
        return coeff.reshape(batch, positions, *[1] * (h.dim() - 2))
    if h.dim() == 2 and 1 not in coeff.shape and h.shape[0] == batch * positions:
        return coeff.reshape(-1, 1)
    raise InputError(
        f"site {key!r}: coeff is given for {batch} rows of {positions} positions in this call, but its input has shape "
        f"{(*h.shape[:-1], 'd_in')}; leave the site out with exclude_modules"
    )
