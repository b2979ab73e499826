"""Failures put into surgery, and what must be unchanged after them."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import surgery
import surgery.verbs.apply
from surgery import apply_surgery, sites
from tests.support.model_state import state_of

FAILURES = (RuntimeError, KeyboardInterrupt)


def refused(model: nn.Module, error: type[BaseException] = surgery.SurgeryError, **options) -> str:
    """Assert that surgery raises and leaves the model as it was; return the message."""
    before, random_state = state_of(model), torch.get_rng_state()
    with pytest.raises(error) as caught:
        apply_surgery(model, **{"variant": "antipasto", "progress": False, **options})
    assert state_of(model) == before
    assert sites(model) == {}
    assert torch.equal(torch.get_rng_state(), random_state)
    return str(caught.value)


def fails_at(monkeypatch, target: str, call: int, error: type[BaseException], *, after: bool = False) -> None:
    """Make the n-th call of a function raise, before it does its work or after."""
    module, _, name = target.rpartition(".")
    original, calls = getattr(sys.modules[module], name), []

    def wrapper(*args, **kwargs):
        calls.append(args)
        result = None if len(calls) == call and not after else original(*args, **kwargs)
        if len(calls) == call:
            raise error("injected")
        return result

    monkeypatch.setattr(sys.modules[module], name, wrapper)
