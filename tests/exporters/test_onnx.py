"""ONNX export: merged and live graphs in ONNX Runtime against PyTorch, and failures that leave nothing behind."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from exporters import ExportError, export, formats
from surgery import InputError, apply_surgery, set_coeff, sites, steer, to_graph
from tests.support.onnx_models import operated, session
from tests.support.shared_exports import SharedExports
from tests.support.tolerance import assert_close
from tests.support.zoo import SmallModel, full, small_model


def first_output(path: Path, p: SmallModel, inputs: Any = None, **coefficient: np.ndarray) -> torch.Tensor:
    running = session(path)
    inputs = p.inputs if inputs is None else inputs
    if not isinstance(inputs, dict):
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        inputs = dict(zip((value.name for value in running.get_inputs()), inputs, strict=True))
    names = {value.name for value in running.get_inputs()}
    feed = {name: value.numpy() for name, value in inputs.items() if name in names}
    return torch.from_numpy(running.run(None, {**feed, **coefficient})[0])


@pytest.mark.parametrize("name", ["mlp", *full("qwen3")])
def test_graph_modules_export_as_their_models_do(name: str, tmp_path: Path) -> None:
    p = operated(name)
    graph = to_graph(p.model, p.inputs)
    for mode in ("merged", "live"):
        report = export(graph, "onnx", tmp_path / f"{mode}.onnx", mode=mode, example_inputs=p.inputs)
        assert 0 <= report.max_error < 1e-5
        assert_close(first_output(report.path, p), p.run())
    with steer(p.model, -0.5):
        assert_close(first_output(tmp_path / "live.onnx", p, coeff=np.array(-0.5, np.float32)), p.run())
    assert sites(graph).keys() == sites(p.model).keys()


@pytest.mark.parametrize(
    "name", ["mlp", "qwen3", *full("raw", "attention", "encoder_layer", "gpt2", "bert", "vit", "t5")]
)
def test_merged_agrees_and_has_no_trace_of_the_adapter(name: str, exported: SharedExports) -> None:
    p, report = exported(operated, name)
    assert report.files == (report.path,)
    assert 0 <= report.max_error < 1e-5
    assert_close(first_output(report.path, p), p.run())
    graph = onnx.load(report.path).graph
    named = [v.name for v in (*graph.initializer, *graph.input)] + [n.op_type for n in graph.node]
    assert not [n for n in named if "coeff" in n or "factors" in n or "core" in n or n == "Elu"]


@pytest.mark.parametrize(
    "name", ["mlp", "encoder_layer", "gpt2", "t5", *full("raw", "bert", "vit", "attention", "qwen3")]
)
def test_live_takes_coeff_and_defaults_to_one(name: str, exported: SharedExports) -> None:
    p, report = exported(operated, name, "live")
    path = report.path
    assert_close(first_output(path, p), p.run())
    for coeff in (0.0, 0.5, -1.0):
        with steer(p.model, coeff):
            expected = p.run()
        assert_close(first_output(path, p, coeff=np.array(coeff, np.float32)), expected)
        assert_close(first_output(path, p, coeff=np.array([coeff], np.float32)), expected)


def test_a_new_directory_gets_the_graph(tmp_path: Path) -> None:
    p = operated("mlp")
    path = export(p.model, "onnx", tmp_path / "live", mode="live", example_inputs=p.inputs).path
    assert path == tmp_path / "live" / "model.onnx"
    assert_close(first_output(path, p), p.run())


@pytest.mark.parametrize("name", ["mlp", *full("qwen3", "t5")])
def test_live_steers_rows_apart(name: str, exported: SharedExports) -> None:
    p, report = exported(operated, name, "live")
    path = report.path
    rows = torch.linspace(-1, 1, p.run().shape[0])
    with steer(p.model, rows):
        expected = p.run()
    assert_close(first_output(path, p, coeff=rows.numpy()), expected)


def test_sizes_are_dynamic_and_names_are_the_models_own(exported: SharedExports) -> None:
    p, report = exported(operated, "qwen3", "live")
    path = report.path
    running = session(path)
    assert [(v.name, v.shape) for v in running.get_inputs()] == [
        ("input_ids", ["batch", "sequence"]),
        ("attention_mask", ["batch", "sequence"]),
    ]
    assert [v.name for v in running.get_overridable_initializers()] == ["coeff"]
    assert running.get_outputs()[0].name == "logits"
    ids = torch.randint(0, 64, (3, 13))
    other = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_close(first_output(path, p, other), p.run(inputs=other))


def test_default_inputs_and_a_batch_of_one(tmp_path: Path) -> None:
    p = operated("gpt2", layers=1)
    assert export(p.model, "onnx", tmp_path / "a.onnx").max_error < 1e-5
    one = {"input_ids": torch.randint(0, 64, (1, 5))}
    path = export(p.model, "onnx", tmp_path / "b.onnx", example_inputs=one).path
    assert session(path).get_inputs()[0].shape == ["batch", "sequence"]


def test_left_padding_is_compared_where_it_means_something(tmp_path: Path) -> None:
    p = operated("qwen3", layers=1)
    p.inputs["attention_mask"][0, :3] = 0
    assert export(p.model, "onnx", tmp_path / "m.onnx", example_inputs=p.inputs).max_error < 1e-5


def test_float16_keeps_the_coefficient_in_float32(tmp_path: Path) -> None:
    p = operated("mlp", torch.float16)
    path = export(p.model, "onnx", tmp_path / "m.onnx", mode="live", example_inputs=p.inputs).path
    assert session(path).get_overridable_initializers()[0].type == "tensor(float)"
    with steer(p.model, 0.5):
        assert_close(first_output(path, p, coeff=np.array(0.5, np.float32)), p.run(), torch.float16)


@pytest.mark.parametrize("name", ["mlp", *full("qwen3")])
def test_a_live_export_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    """As ``tests/contracts/test_exporters.py`` holds of every format in its first mode."""
    p = operated(name)
    set_coeff(p.model, 0.7)
    p.model.train()
    tensors = {name: (id(t), t.clone()) for name, t in p.model.state_dict(keep_vars=True).items()}
    modules = [(name, id(m), type(m), m.training) for name, m in p.model.named_modules()]
    export(p.model, "onnx", tmp_path / "m.onnx", mode="live", example_inputs=p.inputs)
    assert modules == [(name, id(m), type(m), m.training) for name, m in p.model.named_modules()]
    for name, tensor in p.model.state_dict(keep_vars=True).items():
        assert id(tensor) == tensors[name][0]
        assert torch.equal(tensor, tensors[name][1])
    assert "forward" not in vars(p.model)
    assert {site.steering.coeff.item() for site in sites(p.model).values()} == {torch.tensor(0.7).item()}


def test_merged_takes_the_present_coeff(tmp_path: Path) -> None:
    p = operated("mlp")
    set_coeff(p.model, -0.5)
    assert_close(first_output(export(p.model, "onnx", tmp_path / "m.onnx", example_inputs=p.inputs).path, p), p.run())


@pytest.mark.parametrize("mode", [*full("merged"), "live"])
def test_two_exports_are_byte_identical_and_hold_no_path(mode: str, tmp_path: Path) -> None:
    p = operated("mlp")
    data = [
        export(p.model, "onnx", tmp_path / f"{i}.onnx", mode=mode, example_inputs=p.inputs).path.read_bytes()
        for i in range(2)
    ]
    assert data[0] == data[1]
    assert b"site-packages" not in data[0]
    assert str(Path(__file__).parents[2]).encode() not in data[0]


def test_a_plain_model_exports_too(tmp_path: Path) -> None:
    p = small_model("mlp")
    assert_close(first_output(export(p.model, "onnx", tmp_path / "m.onnx", example_inputs=p.inputs).path, p), p.run())


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = operated("mlp")
    with pytest.raises(ExportError, match=r"unknown format 'onx' .*onnx"):
        export(p.model, "onx", tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="no option speed"):
        export(p.model, "onnx", tmp_path / "m.onnx", speed=1)
    with pytest.raises(ExportError, match="'merged', 'live', 'swappable'"):
        export(p.model, "onnx", tmp_path / "m.onnx", mode="fast", example_inputs=p.inputs)
    with pytest.raises(ExportError, match="carries none"):
        export(small_model("mlp").model, "onnx", tmp_path / "m.onnx", mode="live", example_inputs=p.inputs)
    with pytest.raises(InputError, match="needs example_inputs"):
        export(p.model, "onnx", tmp_path / "m.onnx")
    with pytest.raises(InputError, match="does not run"):
        export(p.model, "onnx", tmp_path / "m.onnx", example_inputs=torch.randn(2, 99))
    with pytest.raises(ExportError, match="bfloat16"):
        export(operated("mlp", torch.bfloat16).model, "onnx", tmp_path / "m.onnx", example_inputs=p.inputs)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"pip install .*\[onnx\]"):
        export(p.model, "onnx", tmp_path / "m.onnx", example_inputs=p.inputs)
    assert list(tmp_path.iterdir()) == []


class Cumulative(nn.Module):
    """Uses an operation that no ONNX translation exists for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(self.linear(x)).real


def test_an_operation_without_translation_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Cumulative cannot be exported"):
        export(Cumulative(), "onnx", tmp_path / "new" / "m.onnx", example_inputs=torch.randn(4, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.formats import onnx as module

    p = operated("mlp")
    real = module.finish

    def corrupt(graph: Any, *others: Any) -> int:
        shared = real(graph, *others)
        value = next(v for v in graph.graph.initializers.values() if v.const_value.size > 100)
        value.const_value = module.need("onnx_ir", "onnx").tensor(value.const_value.numpy() * 1.01, name=value.name)
        return shared

    monkeypatch.setattr(module, "finish", corrupt)
    with pytest.raises(ExportError, match="differs from PyTorch"):
        export(p.model, "onnx", tmp_path / "m.onnx", example_inputs=p.inputs)
    assert list(tmp_path.iterdir()) == []


def test_a_full_directory_is_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="new or empty directory"):
        export(operated("mlp").model, "onnx", tmp_path, example_inputs=torch.randn(5, 12))
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_external_data_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.onnx.finish.PROTOBUF_LIMIT", 100)
    p = operated("mlp")
    report = export(p.model, "onnx", tmp_path / "m.onnx", example_inputs=p.inputs)
    main, data = report.files
    assert main == report.path
    assert re.fullmatch(r"m\.onnx\.[0-9a-f]{16}\.data", data.name)
    assert_close(first_output(report.path, p), p.run())
    again = export(set_coeff(p.model, 0.5), "onnx", tmp_path / "m.onnx", example_inputs=p.inputs)
    assert sorted(tmp_path.iterdir()) == sorted(again.files)  # those of the first graph are gone
    assert data not in again.files
    assert_close(first_output(report.path, p), p.run())


@pytest.mark.parametrize("name", ["mlp", "qwen3", *full("gpt2", "t5")])
def test_graph_modules_steer_rows_apart(name: str, tmp_path: Path) -> None:
    p = operated(name, **({"layers": 1} if name in ("qwen3", "gpt2") else {}))
    graph = to_graph(p.model, p.inputs)
    path = export(graph, "onnx", tmp_path / "m.onnx", mode="live", example_inputs=p.inputs).path
    rows = torch.linspace(-1, 1, p.run().shape[0])
    with steer(p.model, rows):
        assert_close(first_output(path, p, coeff=rows.numpy()), p.run())
    with steer(p.model, -0.5):
        assert_close(first_output(path, p, coeff=np.array(-0.5, np.float32)), p.run())
    assert_close(first_output(path, p), p.run())


def tensors_of(path: Path) -> list[np.ndarray]:
    return [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]


@pytest.mark.parametrize("mode", [*full("merged", "live"), "swappable"])
@pytest.mark.parametrize("name", ["raw", "attention", "qwen3", *full("gpt2", "t5")])
def test_no_tensor_is_stored_twice(name: str, mode: str, exported: SharedExports) -> None:
    found = tensors_of(exported(operated, name, mode)[1].path)
    large = [tensor for tensor in found if tensor.size > 36]
    assert large
    for i, one in enumerate(large):
        for other in large[:i]:
            assert not (one.shape == other.shape and np.array_equal(one, other))
            assert not (one.shape == other.T.shape and np.array_equal(one, other.T))


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    p = small_model("qwen3", layers=1)
    report = export(p.model, "onnx", tmp_path / "m.onnx", example_inputs=p.inputs)
    assert report.details["shared"] > 0
    held = sum(parameter.numel() for parameter in p.model.parameters())
    assert sum(tensor.size for tensor in tensors_of(report.path) if tensor.dtype == np.float32) < held + 200


@pytest.mark.parametrize("name", ["mlp", *full("gpt2", "qwen3", "bert")])
def test_merged_is_no_larger_than_the_base(name: str, tmp_path: Path) -> None:
    p = operated(name)
    base = export(small_model(name).model, "onnx", tmp_path / "base.onnx", example_inputs=p.inputs)
    report = export(p.model, "onnx", tmp_path / "m.onnx", example_inputs=p.inputs, against_base=True)
    assert report.details["bytes"] == report.path.stat().st_size
    assert report.details["base_bytes"] == base.details["bytes"] == base.path.stat().st_size
    assert report.details["bytes"] <= report.details["base_bytes"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base.onnx", "m.onnx"]
    live = export(p.model, "onnx", tmp_path / "l.onnx", mode="live", example_inputs=p.inputs, against_base=True)
    assert live.details["base_bytes"] == base.details["bytes"]
    assert live.details["bytes"] > live.details["base_bytes"] + live.details["adapter_bytes"]


@pytest.mark.parametrize("mode", [*full("merged", "live"), "swappable"])
def test_flags_of_the_model_stay(mode: str, tmp_path: Path) -> None:
    p = operated("mlp")
    before = {name: parameter.requires_grad for name, parameter in p.model.named_parameters()}
    export(p.model, "onnx", tmp_path / "m.onnx", mode=mode, example_inputs=p.inputs, against_base=True)
    assert before == {name: parameter.requires_grad for name, parameter in p.model.named_parameters()}
    assert any(before.values())
    assert not all(before.values())


def test_bfloat16_without_the_comparison(tmp_path: Path) -> None:
    p = operated("mlp", torch.bfloat16)
    report = export(p.model, "onnx", tmp_path / "m.onnx", mode="live", example_inputs=p.inputs, check=False)
    assert report.max_error != report.max_error
    kinds = {tensor.data_type for tensor in onnx.load(report.path).graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in kinds


def test_float64(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6)).double(), torch.randn(5, 12).double()
    apply_surgery(model, "antipasto", r=6, example_inputs=x, progress=False)
    for site in sites(model).values():
        site.core.g.data.normal_(std=0.5)
    for mode in ("merged", "live", "swappable"):
        path = tmp_path / f"{mode}.onnx"
        assert export(model, "onnx", path, mode=mode, example_inputs=x).max_error < 1e-12
    p = operated("mlp", torch.float64)
    with pytest.raises(ExportError, match="Erf"):  # of GELU, which ONNX Runtime has in float32 alone
        export(p.model, "onnx", tmp_path / "m.onnx", mode="swappable", example_inputs=p.inputs)


def test_formats_are_found_by_their_files() -> None:
    folder = Path(sys.modules["exporters"].__file__ or "").parent / "formats"
    assert formats() == sorted(f.stem for f in folder.glob("*.py") if not f.stem.startswith("_"))
