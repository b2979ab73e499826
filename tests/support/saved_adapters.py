"""Saved adapters, their edited copies, and what loading must refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import load_adapter, save_adapter
from tests.support.adapter_files import Edit
from tests.support.model_state import state_of
from tests.support.operated_models import operated
from tests.support.zoo import SmallModel, small_model


def site(key: str, **values: Any) -> Edit:
    return lambda config: config["sites"][key].update(values)


def saved(path: Path, name: str = "mlp", dtype: torch.dtype = torch.float32) -> SmallModel:
    """An operated model, saved to a directory."""
    found = operated(name, dtype)
    assert save_adapter(found.model, path) == path
    return found


def refused(path: Path, model: nn.Module | None = None) -> str:
    """Assert that loading raises and leaves the model as it was; return the message."""
    model = small_model("mlp").model if model is None else model
    before = state_of(model)
    with pytest.raises(surgery.AdapterError) as caught:
        load_adapter(model, path)
    assert state_of(model) == before
    return str(caught.value)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}
