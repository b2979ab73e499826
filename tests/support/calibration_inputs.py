"""Padded batches and texts to calibrate on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from surgery import Statistics, calibrate
from surgery.factors.statistic import Statistic
from tests.support.tolerance import assert_close

F64 = torch.float64


def quietly(model: nn.Module, data: Any, variant: Any = "antipasto", **options: Any) -> Statistics:
    return calibrate(model, variant, data, **{"r": 4, "progress": False, **options})


def check_moment(model: nn.Module, key: str, statistic: Statistic, X: torch.Tensor, dtype: torch.dtype = F64) -> None:
    """Compare a second moment with that of tokens (n, d_in) in numpy's float64."""
    x = X.double().numpy()
    if statistic.side == "output":  # formed in the dtype of the model
        dtype = X.dtype if dtype is F64 else dtype
        weight = key if key.endswith("weight") else f"{key}.weight"
        W = model.get_parameter(weight).detach().double().numpy()
        x = x @ (W if type(model.get_submodule(weight.rpartition(".")[0])).__name__ == "Conv1D" else W.T)
    assert statistic.counts == {"all": len(x)}
    assert_close(statistic.mean("moment"), torch.from_numpy(x.T @ x / len(x)), dtype)


def text(rows: int = 3, length: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str, rows: int = 3, length: int = 8) -> torch.Tensor:
    """A mask with a token in each row, and a row without padding."""
    mask = torch.ones(rows, length, dtype=torch.long)
    for row, missing in enumerate((min(3, length - 1), 0, length - 1)[:rows]):
        mask[row, slice(0, missing) if side == "left" else slice(length - missing, length)] = 0
    return mask
