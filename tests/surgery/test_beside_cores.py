"""Parameters trained beside the cores: saved and loaded with them, never written, put back by undo."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import surgery
from surgery import apply_surgery, load_adapter, merge, recalibrate, save_adapter, sites, to_graph, undo_surgery
from surgery.hosting.beside_cores import base_parameters, beside_cores
from tests.support.adapter_files import configuration, edit_config, edit_tensors
from tests.support.model_state import state_of
from tests.support.operated_models import randomise
from tests.support.saved_adapters import contents

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Small(nn.Module):
    """An embedding that is tied to the head, a norm, a site, and a module that is not called."""

    def __init__(self, rows: int = 6, tie: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(rows, 8)
        self.body, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, rows, bias=False)
        if tie:
            self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x + self.tokens.weight[:1])
        h = h + self.attention(h[None], h[None], h[None], need_weights=False)[0][0]
        return self.head(self.norm(h))


def small(**options: Any) -> Small:
    torch.manual_seed(0)
    return Small(**options).eval()


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(X)
    return found


def trained(model: Small, *names: str) -> Small:
    """Operated on its body and its attention; these parameters are trained in place."""
    targets, x = ["body", "out_proj", "in_proj_weight"], X.to(model.body.weight.dtype)
    randomise(apply_surgery(model, "antipasto", r=4, target_modules=targets, example_inputs=x, progress=False), 0.3)
    for name in names:
        train(model, name)
    return model


def train(model: nn.Module, name: str) -> None:
    parameter = base_parameters(model)[name]
    parameter.requires_grad_(True)
    with torch.no_grad():
        parameter.mul_(1.5).add_(0.25)


EACH = ["tokens.weight", "head.weight", "norm.bias", "body.bias", "body.weight", "attention.in_proj_weight",
        "attention.in_proj_bias", "attention.out_proj.bias"]  # fmt: skip


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", EACH)
def test_any_parameter_is_saved_loaded_and_put_back(name, tie, tmp_path):
    model, fresh = trained(small(tie=tie), name), small(tie=tie)
    before, base = state_of(fresh), run(fresh)
    save_adapter(model, tmp_path / "one")
    load_adapter(fresh, tmp_path / "one", progress=False)
    assert torch.equal(run(fresh), run(model))
    assert not torch.equal(run(fresh), base)
    assert beside_cores(fresh).keys() == beside_cores(model).keys()
    assert (fresh.head.weight is fresh.tokens.weight) is tie
    save_adapter(fresh, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    undo_surgery(fresh)
    assert state_of(fresh) == before


def test_all_of_a_model_can_be_trained(tmp_path):
    model = trained(small(), *EACH)
    model.requires_grad_(True)
    fresh = load_adapter(small(), save_adapter(model, tmp_path), progress=False)
    assert torch.equal(run(fresh), run(model))


def test_nothing_is_saved_that_is_frozen(tmp_path):
    save_adapter(trained(small()), tmp_path)
    assert "trained" not in configuration(tmp_path)


def test_undo_says_what_it_leaves_as_it_was_trained():
    model = trained(small(), "norm.bias", "head.weight")
    kept = model.norm.bias.clone()
    with pytest.warns(UserWarning, match=r"'norm\.bias' \(2 such\) could be trained in place") as caught:
        undo_surgery(model)
    assert len([w for w in caught if w.category is UserWarning]) == 1
    assert torch.equal(model.norm.bias, kept)
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_load_replaces_the_first(tmp_path):
    save_adapter(trained(small(), "norm.bias", "body.weight"), tmp_path / "one")
    save_adapter(trained(small(), "head.weight"), tmp_path / "two")
    model = small()
    before = state_of(model)
    load_adapter(model, tmp_path / "one", progress=False)
    load_adapter(model, tmp_path / "two", progress=False)
    assert list(beside_cores(model)) == ["head.weight"]
    assert torch.equal(run(model), run(load_adapter(small(), tmp_path / "two", progress=False)))
    undo_surgery(model)
    assert state_of(model) == before


def test_what_was_loaded_stays_through_other_verbs(tmp_path):
    save_adapter(trained(small(), "norm.bias"), tmp_path / "one")
    for verb in (
        lambda m: recalibrate(m, [X, X], reset=True, progress=False),
        lambda m: apply_surgery(m, "antipasto", r=4, target_modules=["head"], example_inputs=X, progress=False),
        lambda m: m.norm.requires_grad_(False),
        copy.deepcopy,
        lambda m: to_graph(m, X),
        lambda m: apply_surgery(
            nn.Sequential(m, nn.Linear(6, 6)), "antipasto", r=4, target_modules=["1"], example_inputs=X, progress=False
        ),
    ):
        model = load_adapter(small(), tmp_path / "one", progress=False)
        kept = model.norm.bias.detach().clone()
        other = verb(model)
        other = other if isinstance(other, nn.Module) and not isinstance(other, nn.LayerNorm) else model
        (name,) = beside_cores(other)
        assert name.endswith("norm.bias")
        assert torch.equal(beside_cores(other)[name], kept)


def test_a_merge_holds_what_was_loaded(tmp_path):
    save_adapter(trained(small(), "norm.bias", "body.bias"), tmp_path)
    model = load_adapter(small(), tmp_path, progress=False)
    kept = model.norm.bias.detach().clone()
    expected = run(model)
    merge(model, untie=True)
    assert torch.equal(model.norm.bias, kept)
    assert torch.allclose(run(model), expected, atol=1e-5)


def test_undo_follows_a_cast_of_the_model(tmp_path):
    save_adapter(trained(small(), "norm.bias"), tmp_path)
    model = load_adapter(small(), tmp_path, progress=False).to(torch.float64)
    undo_surgery(model)
    expected = small().to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(model.norm.bias, expected.norm.bias)


def test_a_parameter_keeps_the_dtype_that_it_was_trained_in(tmp_path):
    model = trained(small().to(torch.bfloat16))
    model.head.weight = nn.Parameter(model.head.weight.detach().float() * 1.01)
    save_adapter(model, tmp_path)
    fresh = load_adapter(small().to(torch.bfloat16), tmp_path, progress=False)
    assert fresh.head.weight.dtype == torch.float32
    assert torch.equal(fresh.head.weight, model.head.weight)
    wide = trained(small(), "norm.bias")
    save_adapter(wide, tmp_path / "wide")
    cast = load_adapter(small().to(torch.bfloat16), tmp_path / "wide", progress=False)
    assert torch.equal(cast.norm.bias, wide.norm.bias.to(torch.bfloat16))


class Normed(nn.Module):
    """A batch norm, whose forward in training writes to its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.body(x))


def normed() -> nn.Module:
    torch.manual_seed(0)
    return Normed().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_that_training_moves_are_saved(dtype, tmp_path):
    model, fresh = normed().to(dtype), normed().to(dtype)
    x = X.to(dtype)
    before = state_of(fresh)
    apply_surgery(model, "antipasto", r=4, example_inputs=x, progress=False)
    save_adapter(model, tmp_path / "still")
    assert "trained" not in configuration(tmp_path / "still")
    model.train()(x + 3)
    model.eval()
    save_adapter(model, tmp_path / "moved")
    names = ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]
    assert sorted(configuration(tmp_path / "moved")["trained"]) == names
    load_adapter(fresh, tmp_path / "moved", progress=False)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    save_adapter(fresh, tmp_path / "again")
    assert contents(tmp_path / "moved") == contents(tmp_path / "again")
    kept = fresh.norm.running_mean.clone()
    recalibrate(fresh, [x, x], reset=True, progress=False)
    assert torch.equal(fresh.norm.running_mean, kept)
    assert sorted(beside_cores(fresh)) == names
    undo_surgery(fresh)
    assert state_of(fresh) == before
    model.to(torch.float64)
    with pytest.warns(UserWarning, match=r"\(3 such\) could be trained in place"):
        undo_surgery(model)


def test_a_graph_brings_it_into_modules_of_its_own(tmp_path):
    def layers() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval()

    model = layers()
    randomise(apply_surgery(model, "antipasto", r=4, example_inputs=X, progress=False), 0.3)
    model[1].bias.requires_grad_(True)
    with torch.no_grad():
        model[1].bias.add_(1)
    shared = layers()
    graph, before, base = torch.fx.symbolic_trace(shared), state_of(shared), run(shared)
    load_adapter(graph, save_adapter(model, tmp_path), progress=False)
    assert torch.allclose(run(graph), run(model), atol=1e-5)
    assert not torch.allclose(run(graph), base, atol=1e-2)
    assert torch.equal(run(shared), base)
    save_adapter(graph, tmp_path / "again")
    assert configuration(tmp_path / "again")["trained"] == {"1.bias": []}
    undo_surgery(graph)
    assert state_of(shared) == before
    assert torch.equal(run(graph), base)


def refused(model: nn.Module, path: Path) -> str:
    before = state_of(model)
    with pytest.raises(surgery.AdapterError) as caught:
        load_adapter(model, path, progress=False)
    assert state_of(model) == before
    return str(caught.value)


def test_a_model_without_a_place_for_it_is_refused(tmp_path):
    model = trained(small())
    model.extra = nn.Linear(2, 2)
    save_adapter(model, tmp_path / "extra")
    assert "'extra.weight' was trained beside the cores, and the model has no such" in refused(
        small(), tmp_path / "extra"
    )
    save_adapter(trained(small(rows=7), "tokens.weight"), tmp_path / "rows")
    assert "with shape [7, 8], and the model's has [6, 8]" in refused(small(), tmp_path / "rows")
    save_adapter(trained(small(), "tokens.weight"), tmp_path / "untied")
    assert "the model ties it to 'head.weight'" in refused(small(tie=True), tmp_path / "untied")


@pytest.mark.parametrize(
    "trained_field",
    [
        [],
        {"norm.bias": None},
        {"norm.bias": [3]},
        {"norm.bias": ["norm.bias"]},
        {"nowhere": []},
        {"body.weight": []},
        "x",
    ],
)
def test_a_damaged_field_is_refused(trained_field, tmp_path):
    save_adapter(trained(small(), "norm.bias"), tmp_path)
    edit_config(tmp_path, lambda config: config.update(trained=trained_field))
    refused(small(), tmp_path)


@pytest.mark.parametrize("value", [torch.zeros(9), torch.zeros(8, dtype=torch.int64), torch.full((8,), float("nan"))])
def test_a_damaged_tensor_is_refused(value, tmp_path):
    save_adapter(trained(small(), "norm.bias"), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"trained.norm.bias": value}))
    refused(small(), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("trained.norm.bias"))
    assert "is missing" in refused(small(), tmp_path)


@pytest.mark.parametrize("name", ["bias", "weight"])
def test_pruned_parameters_load(name, tmp_path):
    def pruned() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(prune.l1_unstructured(nn.Linear(8, 8), name, 0.5), nn.Linear(8, 8)).eval()

    model = pruned()
    randomise(apply_surgery(model, "antipasto", r=4, example_inputs=X, progress=False), 0.3)
    getattr(model[0], f"{name}_orig").requires_grad_(True)
    with torch.no_grad():
        getattr(model[0], f"{name}_orig").add_(1)
    fresh = load_adapter(pruned(), save_adapter(model, tmp_path), progress=False)
    assert torch.equal(run(fresh), run(model))
    assert {key: site.bias is None for key, site in sites(fresh).items()} == {
        key: site.bias is None for key, site in sites(model).items()
    }


def test_an_older_file_with_a_pruned_bias_loads(tmp_path):
    model = nn.Sequential(prune.l1_unstructured(nn.Linear(8, 8), "bias", 0.5)).eval()
    randomise(apply_surgery(model, "antipasto", r=4, example_inputs=X, progress=False), 0.3)
    expected = run(model)
    save_adapter(model, tmp_path)
    assert configuration(tmp_path)["sites"]["0"]["bias"] is None
    edit_config(tmp_path, lambda config: config["sites"]["0"].update(bias="0.bias"))
    assert torch.equal(run(load_adapter(undo_surgery(model), tmp_path, progress=False)), expected)
