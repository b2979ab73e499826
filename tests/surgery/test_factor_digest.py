"""Adapters without factors: small, recomputed on loading, and refused where that gives others."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import surgery
from exporters import merge_checkpoint, swap
from surgery import apply_surgery, load_adapter, save_adapter, sites
from surgery.modules.core import Factors
from surgery.storage.adapter_file import CONFIG, TENSORS
from surgery.storage.factor_digest import TOLERANCE, digest
from surgery.variants import REGISTRY
from tests.support.adapter_files import edit_config, edit_tensors
from tests.support.model_state import state_of
from tests.support.operated_models import each_dtype, each_model, operate, operated, randomise
from tests.support.saved_adapters import refused, site
from tests.support.zoo import small_model

FROM_DATA = {name for name, cls in REGISTRY.items() if cls().needs_calibration}


@each_dtype
@each_model
def test_a_reloaded_adapter_has_the_same_factors(name, dtype, tmp_path):
    found, fresh = operated(name, dtype), small_model(name, dtype)
    save_adapter(found.model, tmp_path / "small", factors="recompute")
    load_adapter(fresh.model, tmp_path / "small", progress=False)
    for one, other in zip(sites(found.model).values(), sites(fresh.model).values(), strict=True):
        for name in ("U", "S", "Vh"):
            assert torch.equal(getattr(one.factors, name), getattr(other.factors, name))
    assert torch.equal(fresh.run(), found.run())


@pytest.mark.parametrize("variant", sorted(set(REGISTRY) - FROM_DATA))
def test_every_variant_whose_factors_follow_from_the_weight(variant, tmp_path):
    found, fresh = operate(small_model("mlp"), variant=variant, target_modules="all-linear"), small_model("mlp")
    randomise(found.model)
    save_adapter(found.model, tmp_path, factors="recompute")
    load_adapter(fresh.model, tmp_path)
    assert torch.equal(fresh.run(), found.run())


def test_a_variant_of_data_is_refused(tmp_path):
    data = [torch.randn(5, 12) for _ in range(4)]
    for variant in sorted(FROM_DATA):
        given = surgery.Contrast(data[:2], data[2:]) if REGISTRY[variant]().statistic == "contrast" else data
        found = operate(small_model("mlp"), variant=variant, r=2, calibration=given, target_modules="all-linear")
        with pytest.raises(surgery.AdapterError, match=f"site '.': {variant} chooses its factors by data"):
            save_adapter(found.model, tmp_path / variant, factors="recompute")
    assert list(tmp_path.iterdir()) == []


def test_directions_that_were_chosen_by_data_are_refused(tmp_path):
    spread = torch.randn(40, 12) * torch.logspace(0, 2, 12)
    found = operate(small_model("mlp"), calibration=[spread], r=3)
    with pytest.raises(surgery.AdapterError, match="does not follow from its weight alone"):
        save_adapter(found.model, tmp_path / "new", factors="recompute")
    assert list(tmp_path.iterdir()) == []


def test_factors_that_were_cast_are_refused(tmp_path):
    found = operated("mlp")
    found.model.to(torch.bfloat16)
    with pytest.raises(surgery.AdapterError, match="cast"):
        save_adapter(found.model, tmp_path / "new", factors="recompute")


def test_a_file_of_some_kilobytes_for_a_large_weight(tmp_path):
    model = apply_surgery(nn.Linear(512, 384), "antipasto", r=128, example_inputs=torch.ones(1, 512), progress=False)
    exact, small = save_adapter(model, tmp_path / "a"), save_adapter(model, tmp_path / "b", factors="recompute")
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in (exact, small)]
    assert sizes[0] > 128 * (512 + 384) * 4
    assert sizes[1] < 4096


@pytest.mark.parametrize("seed", [0, 3])
def test_the_seed_of_a_randomised_factorisation_is_stored(seed, tmp_path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(160, 120)

    x, options = torch.ones(1, 160), {"example_inputs": torch.ones(1, 160), "progress": False}
    model = randomise(apply_surgery(build(), surgery.AntiPaSTO(r=8, svd_method="randomised"), seed=seed, **options))
    save_adapter(model, tmp_path / "one", factors="recompute")
    again = load_adapter(build(), tmp_path / "one", progress=False)
    assert torch.equal(again(x), model(x))
    save_adapter(again, tmp_path / "two", factors="recompute")
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    edit_config(tmp_path / "one", lambda config: next(iter(config["sites"].values())).update(seed=seed + 1))
    before = build()
    message = refused(tmp_path / "one", before)
    assert "the factors that come of its weight here are not those that the adapter was trained in" in message


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_digest_of_other_factors_is_refused(row, tmp_path):
    save_adapter(operated("mlp").model, tmp_path, factors="recompute")
    edit_tensors(tmp_path, lambda t: t["2.digest"][row, 1].add_(2 * TOLERANCE))
    assert "site '2'" in refused(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.update({"0.digest": torch.zeros(3, 5, dtype=torch.float64)}),
        lambda t: t["0.digest"].fill_(float("nan")),
        lambda t: t.pop("0.digest"),
        lambda t: t.update({"0.factors.S": torch.ones(12)}),
    ],
)
def test_a_damaged_digest_is_refused(damage, tmp_path):
    save_adapter(operated("mlp").model, tmp_path, factors="recompute")
    edit_tensors(tmp_path, damage)
    assert "0." in refused(tmp_path)


def factors(seed: int = 0) -> Factors:
    torch.manual_seed(seed)
    U, S, Vh = torch.linalg.svd(torch.randn(30, 20, dtype=torch.float64), full_matrices=False)
    return Factors(U, S, Vh)


def turned(found: Factors, angle: float) -> Factors:
    """Two neighbouring directions, turned in their plane on both sides: the subspaces are the same."""
    turn, turn_by = torch.eye(20, dtype=torch.float64), torch.tensor(angle, dtype=torch.float64)
    turn[3, 3] = turn[4, 4] = turn_by.cos()
    turn[3, 4], turn[4, 3] = -turn_by.sin(), turn_by.sin()
    return Factors(found.U @ turn, found.S, turn.T @ found.Vh)


def test_a_digest_tells_what_matters():
    one = digest(factors())
    assert one.shape == (3, 4)
    assert one.abs().max() < 5
    rounded = Factors(*(t.float() for t in factors().buffers()))
    assert (digest(rounded) - one).abs().max() < TOLERANCE / 50
    assert (digest(turned(factors(), 1e-2)) - one).abs().max() > 3 * TOLERANCE
    flipped = Factors(*(copy.deepcopy(t) for t in factors().buffers()))
    flipped.U[:, 7] *= -1
    flipped.Vh[7] *= -1
    assert (digest(flipped) - one).abs().max() > 100 * TOLERANCE
    swapped = [5, 4, *range(2, 4), 1, 0, *range(6, 20)]
    permuted = Factors(factors().U[:, swapped], factors().S[swapped], factors().Vh[swapped])
    assert (digest(permuted) - one).abs().min() > TOLERANCE
    assert (digest(factors(1)) - one).abs().max() > 1000 * TOLERANCE


def test_a_wider_model_makes_the_factors_of_the_narrow_one(tmp_path):
    found = operated("mlp", torch.bfloat16)
    save_adapter(found.model, tmp_path, factors="recompute")
    wide = load_adapter(small_model("mlp", torch.bfloat16).model.float(), tmp_path, progress=False)
    expected = copy.deepcopy(found.model).float()
    for one, other in zip(sites(wide).values(), sites(expected).values(), strict=True):
        assert torch.equal(one.factors.U, other.factors.U)


def test_a_narrower_model_cannot_make_the_factors(tmp_path):
    save_adapter(operated("mlp").model, tmp_path, factors="recompute")
    message = refused(tmp_path, small_model("mlp").model.bfloat16())
    assert "factors of a float32 weight cannot be recomputed from it in bfloat16" in message
    assert "load the adapter on the model in float32, and cast that" in message


def test_residual_form_and_parts_of_a_packed_weight(tmp_path):
    found, fresh = small_model("attention"), small_model("attention")
    operate(found, target_modules=["in_proj_weight.q"], r=4)
    randomise(found.model)
    load_adapter(fresh.model, save_adapter(found.model, tmp_path / "parts", factors="recompute"))
    assert torch.equal(fresh.run(), found.run())
    found, fresh = operate(small_model("mlp"), form="residual"), small_model("mlp")
    randomise(found.model)
    load_adapter(fresh.model, save_adapter(found.model, tmp_path / "residual", factors="recompute"))
    assert (fresh.run() - found.run()).abs().max() < 1e-5 * found.run().abs().max()


def test_a_checkpoint_is_merged(tmp_path):
    found = small_model("qwen3")
    found.model.save_pretrained(tmp_path / "base")
    operate(found, target_modules=["q_proj", "down_proj"])
    randomise(found.model)
    outs = []
    for kind in ("exact", "recompute"):
        save_adapter(found.model, tmp_path / kind, factors=kind)
        merge_checkpoint(tmp_path / "base", tmp_path / kind, tmp_path / f"{kind}-out", progress=False)
        outs.append(load_file(tmp_path / f"{kind}-out" / "model.safetensors"))
    assert all(torch.equal(outs[0][name], outs[1][name]) for name in outs[0])


def test_a_program_asks_for_stored_factors(tmp_path):
    found = operated("mlp")
    save_adapter(found.model, tmp_path / "small", factors="recompute")
    from exporters import export

    export(found.model, "pt2", tmp_path / "live.pt2", mode="live", example_inputs=found.inputs)
    with pytest.raises(surgery.AdapterError, match="holds no factors"):
        swap(torch.export.load(tmp_path / "live.pt2"), tmp_path / "small")


def test_another_process_makes_the_same_factors(tmp_path):
    found = operated("qwen3")
    save_adapter(found.model, tmp_path / "small", factors="recompute")
    torch.save(found.run(), tmp_path / "expected.pt")
    code = """
import sys, torch
torch.set_num_threads(2)
from pathlib import Path
from surgery import load_adapter
from tests.support.zoo import small_model
found = small_model("qwen3")
load_adapter(found.model, Path(sys.argv[1]) / "small", progress=False)
expected = torch.load(Path(sys.argv[1]) / "expected.pt", weights_only=True)
print(float((found.run() - expected).abs().max() / expected.abs().max()))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=root, check=True)
    assert float(done.stdout) < 1e-6


def test_loading_is_all_or_nothing(tmp_path):
    found = operated("mlp")
    save_adapter(found.model, tmp_path, factors="recompute")
    edit_config(tmp_path, site("4", r=5))
    before, output = state_of(found.model), found.run()
    with pytest.raises(surgery.AdapterError):
        load_adapter(found.model, tmp_path)
    assert state_of(found.model) == before
    assert torch.equal(found.run(), output)
    assert dataclasses.asdict(next(iter(sites(found.model).values())).variant)["r"] == 16
