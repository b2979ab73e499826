"""q, k and v of ``nn.MultiheadAttention.in_proj_weight``, each as a site of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import apply_surgery, load_adapter, merge, save_adapter, set_coeff, sites, steer, undo_surgery
from surgery.verbs.calibrate import recalibrate
from tests.support.adapter_files import edit_config
from tests.support.lowering_models import shake
from tests.support.packed_attention import CALLS, QV, E, X, attention, operated
from tests.support.tolerance import assert_close


def run(model: nn.Module, call: str = "self") -> torch.Tensor:
    with torch.no_grad():
        return model(*CALLS[call])[0]


@pytest.mark.parametrize("call", CALLS)
def test_each_part_has_factors_and_a_core_of_its_own(call: str) -> None:
    model, base = operated(call), attention()
    assert list(sites(model)) == QV
    dense = copy.deepcopy(base).double()
    for i, name in ((0, "q"), (2, "v")):
        site = sites(model)[f"in_proj_weight.{name}"]
        rows = slice(i * E, (i + 1) * E)
        W = base.in_proj_weight.detach().double()[rows]
        assert torch.equal(site.weight, base.in_proj_weight[rows])
        assert torch.equal(site.bias, base.in_proj_bias[rows])
        U, S, Vh = torch.linalg.svd(W)
        assert_close(site.factors.S.double(), S[:6], torch.float32)
        change = (U[:, :6] * (S[:6] * torch.nn.functional.elu(site.core.g.detach().double()))) @ Vh[:6]
        assert_close(site.delta_weight().double(), change, torch.float32)
        dense.in_proj_weight.data[rows] += change
    with torch.no_grad():
        expected = dense(*(x.double() for x in CALLS[call]))[0]
    assert_close(run(model, call), expected)
    with steer(model, 0.0):
        assert torch.equal(run(model, call), run(attention().requires_grad_(False), call))


def test_all_verbs(tmp_path: Path) -> None:
    model, live = operated(), run(operated())
    base = attention()
    assert torch.equal(run(copy.deepcopy(model)), live)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(run(load_adapter(attention(), tmp_path / "adapter")), live)
    assert torch.equal(run(load_adapter(model, tmp_path / "adapter")), live)
    merged = merge(copy.deepcopy(model))
    assert type(merged) is nn.MultiheadAttention
    assert_close(run(merged), live)
    assert torch.equal(merged.in_proj_weight[E : 2 * E], base.in_proj_weight[E : 2 * E])
    parameter = model.parametrizations.in_proj_weight.original
    undo_surgery(model)
    assert model.in_proj_weight is parameter
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert type(model) is nn.MultiheadAttention
    assert torch.equal(run(model), run(base))


def test_gradients_reach_the_cores_alone() -> None:
    model = operated()
    model(*CALLS["self"])[0].square().sum().backward()
    assert all(bool(site.core.g.grad.abs().sum() > 0) for site in sites(model).values())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if p.grad is not None
    ]


def test_parts_and_wholes_do_not_meet() -> None:
    model = operated()
    for targets in ("in_proj_weight", ["in_proj_weight.q"]):
        with pytest.raises(surgery.TargetError, match="already carries an adapter"):
            apply_surgery(model, "antipasto", r=6, target_modules=targets, example_inputs=CALLS["self"], progress=False)
    apply_surgery(model, "lora_xs", r=4, target_modules=["k"], example_inputs=CALLS["self"], progress=False)
    assert sorted(sites(model)) == [f"in_proj_weight.{name}" for name in "kqv"]
    whole = operated(targets=".*")
    assert sorted(sites(whole)) == ["in_proj_weight", "out_proj"]
    with pytest.raises(surgery.TargetError, match="already carries an adapter"):
        apply_surgery(whole, "antipasto", r=6, target_modules=["q"], example_inputs=CALLS["self"], progress=False)


@pytest.mark.matrix
@pytest.mark.parametrize("form", ["delta", "residual"])
@pytest.mark.parametrize("call", CALLS)
def test_graphs_split_the_weight(call: str, form: str, tmp_path: Path) -> None:
    model = operated(call)
    graph = surgery.to_graph(model, CALLS[call], form=form, verify=True, debug=True)
    assert list(sites(graph)) == QV
    for coeff in (1.0, -0.5, 0.0):
        set_coeff(model, coeff)
        set_coeff(graph, coeff)
        assert_close(run(graph, call), run(model, call))
    set_coeff(model, 1.0)
    set_coeff(graph, 1.0)
    for key, site in sites(graph).items():
        assert torch.equal(site.weight, sites(model)[key].weight)
        assert_close(site.delta_weight(), sites(model)[key].delta_weight())
    save_adapter(graph, tmp_path / "adapter")
    assert torch.equal(run(load_adapter(attention(), tmp_path / "adapter"), call), run(model, call))
    assert_close(run(surgery.fold(copy.deepcopy(graph), verify=CALLS[call]), call), run(model, call))
    merged = merge(copy.deepcopy(graph), verify=CALLS[call])
    assert not sites(merged)
    assert_close(run(merged, call), run(model, call))
    assert_close(run(undo_surgery(graph), call), run(attention(), call))
    only = surgery.pipeline(model, CALLS[call], form="residual", only=QV[:1]).graph
    assert not sites(only)
    whole = merge(copy.deepcopy(model)).in_proj_weight
    assert torch.equal(only.in_proj_weight[:E], whole[:E])
    assert torch.equal(only.in_proj_weight[E:], attention().in_proj_weight[E:])


def test_a_failure_takes_off_the_new_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = operated(targets=["q"])
    live = run(model)

    def fail(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("surgery.verbs.apply.measure", fail)
    options: Any = {"example_inputs": CALLS["self"], "lowering": "measure", "progress": True}
    with pytest.raises(MemoryError):
        apply_surgery(model, "antipasto", r=6, target_modules=["v"], **options)
    assert list(sites(model)) == ["in_proj_weight.q"]
    assert torch.equal(run(model), live)


@pytest.mark.parametrize("call", CALLS)
def test_calibration_sees_what_each_part_multiplies(call: str) -> None:
    model = operated(call, "antipasto_corda", ["q", "k", "v"], calibration=[CALLS[call]])
    for i, (name, x) in enumerate(zip("qkv", CALLS[call], strict=True)):
        site = sites(model)[f"in_proj_weight.{name}"]
        W = attention().in_proj_weight.detach().double()[i * E : (i + 1) * E]
        tokens = x.double().flatten(0, 1)
        C = tokens.T @ tokens / len(tokens) + 1e-3 * torch.eye(E, dtype=torch.float64)
        expected = torch.linalg.eigvalsh(W @ C @ W.T).flip(0)[:6].sqrt()
        assert_close(site.factors.S.double(), expected, torch.float32)
    set_coeff(model, 0.0)
    assert_close(run(model, call), run(attention(), call))
    recalibrate(model, [CALLS[call]], reset=True, progress=False)


@pytest.mark.parametrize("rows", [[0], [0, 99], [3, 3], [-1, 4], "all", [0, 4.0], [E, 2 * E]])
def test_wrong_rows_in_a_file_are_refused(rows: Any, tmp_path: Path) -> None:
    save_adapter(operated(), tmp_path)
    edit_config(tmp_path, lambda config: config["sites"]["in_proj_weight.q"].update(rows=rows))
    model = attention()
    with pytest.raises(surgery.AdapterError, match=r"in_proj_weight\.q"):
        load_adapter(model, tmp_path)
    assert not sites(model)


def test_a_part_that_cannot_be_attached_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.utils import parametrize

    model = operated(targets=["q"])
    live = run(model)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(parametrize, "register_parametrization", fail)
    with pytest.raises(MemoryError):
        apply_surgery(model, "antipasto", r=6, target_modules=["v"], example_inputs=CALLS["self"], progress=False)
    assert list(sites(model)) == ["in_proj_weight.q"]
    assert torch.equal(run(model), live)


class Wrapped(nn.Module):
    """An attention of its input to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.att = attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.att(x, x, x)[0]


def test_exports_of_parts(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from exporters import ExportError, export, merge_checkpoint

    model = Wrapped().eval()
    (tmp_path / "base").mkdir()
    save_file({name: t.detach().clone() for name, t in model.state_dict().items()}, tmp_path / "base/model.safetensors")
    shake(apply_surgery(model, "antipasto", r=6, target_modules=["q", "v"], example_inputs=X, progress=False))
    save_adapter(model, tmp_path / "adapter")
    for format in ("dense", "pt2", "onnx"):
        assert export(model, format, tmp_path / format, example_inputs=X).max_error < 1e-5
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, tensor in load_file(tmp_path / "dense/model.safetensors").items():
        assert torch.equal(tensor, merged[name])
    with pytest.raises(ExportError, match="part of a packed weight"):
        export(model, "lora", tmp_path / "lora", example_inputs=X)
    graph = torch.export.export(Wrapped().eval(), (X,)).module()
    with pytest.raises(surgery.CaptureError, match="part of a packed weight"):
        load_adapter(graph, tmp_path / "adapter")
    assert not sites(graph)
