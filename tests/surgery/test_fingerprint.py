"""Fingerprints: the same bytes the same, each read once, and none kept beyond a change."""

from __future__ import annotations

import gc
import hashlib

import pytest
import torch
from torch import nn

import surgery.support.fingerprint as fingerprints
from surgery import load_adapter, save_adapter
from surgery.support.fingerprint import cast_fingerprints, fingerprint
from tests.support.operated_models import operated
from tests.support.zoo import small_model


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the tensors that are read and hashed."""
    seen: list[torch.dtype] = []
    original = fingerprints._hashed

    def counted(tensor: torch.Tensor) -> str:
        seen.append(tensor.dtype)
        return original(tensor)

    monkeypatch.setattr(fingerprints, "_hashed", counted)
    return seen


def test_a_fingerprint_is_of_dtype_shape_and_bytes():
    weight = torch.arange(6.0).reshape(2, 3)
    expected = hashlib.sha256(b"torch.float32(2, 3)" + weight.numpy().tobytes()).hexdigest()
    assert fingerprint(weight) == f"sha256:{expected}"
    assert fingerprint(weight.t().contiguous().t()) == fingerprint(weight)  # however it lies in memory
    assert fingerprint(weight, torch.float16) == fingerprint(weight.half())
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.ones(1))
    assert fingerprint(torch.empty(0, 3)) != fingerprint(torch.empty(3, 0))


def test_a_save_reads_each_weight_once(hashed, tmp_path):
    found = operated("qwen3")
    hashed.clear()  # what surgery read, of the model that this one is a copy of
    save_adapter(found.model, tmp_path / "one")
    assert len(hashed) == 3 * 14  # as it is, and in the two dtypes that hold less
    save_adapter(found.model, tmp_path / "two")
    load_adapter(found.model, tmp_path / "two")
    assert len(hashed) == 3 * 14


def test_any_write_is_seen(hashed):
    weight = nn.Parameter(torch.randn(300, 200))
    other = nn.Parameter(torch.randn(300, 200))
    before = fingerprint(weight)
    with torch.no_grad():
        weight[150, 77] += 1
    after = fingerprint(weight)
    assert before != after == fingerprint(weight)
    weight.data = other.data
    assert fingerprint(weight) == fingerprint(other)
    optimiser = torch.optim.Adam([weight], fused=True)  # which counts no version
    weight.grad = torch.randn(300, 200)
    version, before = weight._version, fingerprint(weight)
    optimiser.step()
    assert fingerprint(weight) != before
    assert fingerprint(weight) == fingerprint(weight.detach().clone())
    weight.data.mul_(2)
    assert fingerprint(weight) == fingerprint(weight.detach().clone())
    assert isinstance(version, int)


def test_nothing_is_kept_of_a_tensor_that_is_gone():
    gc.collect()
    before = len(fingerprints._CACHE)
    weight = torch.randn(8, 8)
    cast_fingerprints(weight)
    assert len(fingerprints._CACHE) == before + 1
    del weight
    gc.collect()
    assert len(fingerprints._CACHE) == before


def test_an_inference_tensor_has_a_fingerprint():
    with torch.inference_mode():
        weight = torch.ones(3, 3)
        assert fingerprint(weight) == fingerprint(torch.ones(3, 3))
        weight.add_(1)
        assert fingerprint(weight) == fingerprint(torch.ones(3, 3) + 1)


def test_the_weights_of_a_model_that_moves(tmp_path):
    found = operated("mlp")
    save_adapter(found.model, tmp_path / "one")
    fresh = small_model("mlp")
    fresh.model.to(torch.bfloat16)
    load_adapter(fresh.model, tmp_path / "one")
