"""Pruning of an exported LoRA: the best there is, its error told, against a full SVD."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from exporters import export
from exporters.peft.low_rank import low_rank
from surgery import (
    sites,
)
from tests.support.peft_models import assert_same_in_peft, exact_change, loaded, operated, ranks
from tests.support.zoo import small_model


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("variant", ["antipasto", "antipasto_corda", "antipasto_rot", "lora_xs"])
@pytest.mark.parametrize("max_rank", [1, 3])
def test_pruning_is_the_best_there_is_and_its_error_is_reported(
    name: str, variant: str, max_rank: int, tmp_path: Path
) -> None:
    p = operated(name, variant)
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs, max_rank=max_rank)
    tensors = load_file(report.path / "adapter_model.safetensors")
    assert set(ranks(report.path).values()) == {max_rank}
    for key, site in sites(p.model).items():
        A, B = (tensors[f"base_model.model.{key}.lora_{x}.weight"].double() for x in "AB")
        change = exact_change(site)
        values = torch.linalg.svdvals(change)
        off = torch.linalg.svdvals(change - B @ A)
        said = report.details["sites"][key]
        assert said["pruned"]
        assert said["spectral_error"] == pytest.approx(float(off[0] / values[0]), abs=1e-12)
        assert said["frobenius_error"] == pytest.approx(float(off.norm() / values.norm()), abs=1e-12)
        assert off[0] == pytest.approx(float(values[max_rank]), rel=1e-5, abs=1e-6 * float(values[0]))
        assert off.norm() == pytest.approx(float(values[max_rank:].norm()), rel=1e-5, abs=1e-6 * float(values[0]))
    deviation = (loaded(p, small_model(name).model, report.path) - p.run()).abs().max() / p.run().abs().max()
    assert report.max_error == pytest.approx(float(deviation), rel=0.5)
    assert report.max_error > 0


def test_a_bound_above_the_rank_prunes_nothing(tmp_path: Path) -> None:
    p = operated("mlp")
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs, max_rank=16)
    assert not any(site["pruned"] for site in report.details["sites"].values())
    assert_same_in_peft(p, lambda: small_model("mlp").model, report.path)


def test_small_directions_are_left_out_on_request(tmp_path: Path) -> None:
    p = operated("mlp", "lora_xs")
    for site in sites(p.model).values():
        scale = torch.tensor([1, 1, 1e-4, 1e-4, 1e-4, 1e-4])
        with torch.no_grad():
            site.core.m.copy_(torch.linalg.qr(site.core.m).Q * scale / site.factors.S)
    exact = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    pruned = export(p.model, "lora", tmp_path / "b", example_inputs=p.inputs, prune_tol=1e-2)
    assert set(ranks(exact.path).values()) == {6}
    assert set(ranks(pruned.path).values()) == {2}
    assert 5e-5 < pruned.details["spectral_error"] < 2e-4
    assert pruned.details["bytes"] < exact.details["bytes"]


@given(data=st.data())
def test_low_rank_factors_against_a_full_svd(data: st.DataObject) -> None:
    d_out, d_in, stack = (data.draw(st.integers(1, n)) for n in (9, 9, 3))
    r = data.draw(st.integers(1, min(d_out, d_in)))
    rank = data.draw(st.integers(0, r))
    most = data.draw(st.none() | st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    shape = (stack,) if data.draw(st.booleans()) else ()
    draw = lambda *size: torch.randn(*shape, *size, generator=generator, dtype=torch.float64)  # noqa: E731
    B, A = draw(d_out, rank) @ draw(rank, r), draw(r, d_in)
    made = low_rank(B, A, torch.float64, most)
    change = B @ A
    values = torch.linalg.svdvals(change)
    expected = min(max(rank, 1), most or 9)
    assert (made.rank, made.pruned) == (expected, expected < rank)
    off, lost = torch.linalg.svdvals(change - made.product()), values[..., expected:]
    scale = max(float(values.max()), 1.0)
    assert float(off.norm()) == pytest.approx(float(lost.norm()), abs=1e-10 * scale)
    if rank:
        assert made.frobenius_error == pytest.approx(float(off.norm() / values.norm()), abs=1e-10)
        assert made.spectral_error == pytest.approx(float(off.max() / values.max()), abs=1e-10)
    else:
        assert (made.frobenius_error, made.spectral_error) == (0.0, 0.0)
        assert not made.product().any()
