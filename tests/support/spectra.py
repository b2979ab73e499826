"""Matrices of a given spectrum."""

from __future__ import annotations

import torch


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def with_spectrum(d_out: int, d_in: int, S: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float64 matrix with given singular values."""
    generator = torch.Generator().manual_seed(seed)
    return orthonormal(d_out, len(S), generator) * S @ orthonormal(d_in, len(S), generator).T
