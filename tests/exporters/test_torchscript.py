"""TorchScript: agrees with PyTorch in a process that has torch alone, steers, says that it is deprecated."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from exporters import ExportError, export
from surgery import set_coeff, sites, steer, to_graph
from surgery.variants import REGISTRY
from tests.support.expert_models import IDS
from tests.support.expert_models import operated as stacked
from tests.support.fresh import run_fresh
from tests.support.onnx_models import operated
from tests.support.program_models import first, shaken, with_variant
from tests.support.tolerance import assert_close
from tests.support.zoo import Forward, SmallModel, small_model

LONG = [pytest.param(name, marks=pytest.mark.full) for name in ("bert", "vit", "t5", "llama")]
NAMES = ["mlp", "raw", "attention", "encoder_layer", "qwen3", "gpt2", *LONG]


@pytest.mark.parametrize("mode", ["merged", "live"])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_and_steers(name: str, mode: str, tmp_path: Path) -> None:
    p = operated(name)
    report = export(p.model, "torchscript", tmp_path / "m.pt", mode=mode, example_inputs=p.inputs)
    assert report.files == (tmp_path / "m.pt",)
    assert 0 <= report.max_error < 1e-5
    assert "deprecated" in report.details["note"]
    program = torch.jit.load(str(report.path))
    assert_close(first(program, p.inputs), p.run())
    for coeff in (0.0, -0.5, 1.5) if mode == "live" else ():
        program.coeff.fill_(coeff)
        with steer(p.model, coeff):
            assert_close(first(program, p.inputs), p.run())


@pytest.mark.parametrize("variant", sorted(REGISTRY))
def test_every_variant_lives(variant: str, tmp_path: Path) -> None:
    p = with_variant(variant)
    program = torch.jit.load(
        export(p.model, "torchscript", tmp_path / "m.pt", mode="live", example_inputs=p.inputs).path
    )
    for coeff in (1.0, 0.3):
        program.coeff.fill_(coeff)
        with steer(p.model, coeff):
            assert_close(first(program, p.inputs), p.run())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    p = operated("mlp", dtype)
    path = export(p.model, "torchscript", tmp_path / "m.pt", mode="live", example_inputs=p.inputs).path
    assert_close(first(torch.jit.load(path), p.inputs), p.run(), dtype)


def test_loads_with_torch_alone(tmp_path: Path) -> None:
    p = operated("qwen3")
    export(p.model, "torchscript", tmp_path / "m.pt", mode="live", example_inputs=p.inputs)
    save_file(p.inputs, tmp_path / "inputs.safetensors")
    run_fresh(
        """
inputs = load_file("inputs.safetensors")
program = torch.jit.load("m.pt")
found = {"one": program(**inputs)["logits"]}
found["by_position"] = program(inputs["input_ids"], inputs["attention_mask"])["logits"]
program.coeff.fill_(-0.5)
found["steered"] = program(**inputs)["logits"]
save_file(found, "found.safetensors")
""",
        tmp_path,
    )
    found = load_file(tmp_path / "found.safetensors")
    assert_close(found["one"], p.run())
    assert torch.equal(found["one"], found["by_position"])
    with steer(p.model, -0.5):
        assert_close(found["steered"], p.run())


def test_the_report_says_whether_other_sizes_are_right(tmp_path: Path) -> None:
    p = operated("qwen3")
    sizes = export(p.model, "torchscript", tmp_path / "a.pt", example_inputs=p.inputs).details["sizes"]
    assert sizes == {"batch": "free", "sequence": "free"}
    counts = Forward(lambda self, x: self.linear(x) + float(x.shape[0]), linear=nn.Linear(4, 4))
    x = torch.randn(3, 4)
    assert export(counts, "torchscript", tmp_path / "b.pt", example_inputs=x).details["sizes"] == {"batch": "wrong"}


@pytest.mark.parametrize("mode", ["merged", "live"])
def test_stacked_experts(mode: str, tmp_path: Path) -> None:
    p = shaken(SmallModel("mixtral", stacked("mixtral"), {"input_ids": IDS}))
    program = torch.jit.load(export(p.model, "torchscript", tmp_path, mode=mode, example_inputs=p.inputs).path)
    assert_close(first(program, p.inputs), p.run())


def test_graph_modules(tmp_path: Path) -> None:
    p = operated("mlp")
    path = export(to_graph(p.model, p.inputs), "torchscript", tmp_path, mode="live", example_inputs=p.inputs).path
    assert path == tmp_path / "model.pt"
    program = torch.jit.load(path)
    program.coeff.fill_(-0.5)
    with steer(p.model, -0.5):
        assert_close(first(program, p.inputs), p.run())


@pytest.mark.parametrize("mode", ["merged", "live"])
def test_leaves_the_model_alone_and_holds_no_path(mode: str, tmp_path: Path) -> None:
    p = operated("gpt2")
    set_coeff(p.model, 0.7)
    p.model.train()
    before = [(name, id(m), type(m), m.training, sorted(vars(m))) for name, m in p.model.named_modules()]
    tensors = {name: id(t) for name, t in p.model.state_dict(keep_vars=True).items()}
    path = export(p.model, "torchscript", tmp_path / "m.pt", mode=mode, example_inputs=p.inputs).path
    assert before == [(name, id(m), type(m), m.training, sorted(vars(m))) for name, m in p.model.named_modules()]
    assert tensors == {name: id(t) for name, t in p.model.state_dict(keep_vars=True).items()}
    assert {site.steering.coeff.item() for site in sites(p.model).values()} == {torch.tensor(0.7).item()}
    with zipfile.ZipFile(path) as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert b"site-packages" not in everything
    assert str(Path(__file__).parents[2]).encode() not in everything
    if mode == "merged":
        assert b"coeff" not in everything


def test_failures_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.formats import torchscript as module

    broken = Forward(lambda self, x: {"y": x, "z": {"deeper": 3}})
    with pytest.raises(ExportError, match="returns a int"):
        export(broken, "torchscript", tmp_path / "new" / "m.pt", example_inputs=torch.randn(2, 4))
    with pytest.raises(ExportError, match="carries none"):
        export(
            small_model("mlp").model, "torchscript", tmp_path / "m.pt", mode="live", example_inputs=torch.randn(5, 12)
        )
    p, real = operated("mlp"), module._traced

    def corrupt(subject: Any) -> Any:
        weight = subject.root.get_parameter("0.weight")
        subject.root.get_submodule("0")._parameters["weight"] = nn.Parameter(weight * 1.01)
        return real(subject)

    monkeypatch.setattr(module, "_traced", corrupt)
    with pytest.raises(ExportError, match="differs from PyTorch"):
        export(p.model, "torchscript", tmp_path / "m.pt", example_inputs=p.inputs)
    assert list(tmp_path.iterdir()) == []
