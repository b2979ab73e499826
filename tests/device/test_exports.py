"""What leaves a model on an accelerator is what leaves the same model on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exporters import compiled, export, export_core, formats
from surgery import set_coeff
from tests.support.device_models import NAME, all_on, operated, there
from tests.support.tolerance import assert_close
from tests.support.zoo import full, small_model

HOSTS = ("mlp", pytest.param("qwen3", marks=pytest.mark.full), pytest.param("gpt2", marks=pytest.mark.full))
FORMATS = [*(name for name in formats() if name != "aoti"), *full("aoti")[: NAME == "cuda"]]  # it knows no stand-in


@pytest.mark.parametrize("name", ["mlp", "qwen3", pytest.param("gpt2", marks=pytest.mark.full)])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format: str, name: str, device: torch.device, tmp_path: Path) -> None:
    here, found = operated(small_model(name)), operated(there(device, name))
    before = found.run()
    for each, place in ((here, "here"), (found, "there")):
        report = export(each.model, format, tmp_path / place, example_inputs=each.inputs)
        assert report.max_error is None or report.max_error < 1e-4
    all_on(found.model, device)
    assert torch.equal(found.run().cpu(), before.cpu())
    for path in tmp_path.glob("here/*.safetensors"):
        mine, theirs = load_file(path), load_file(tmp_path / "there" / path.name)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            assert_close(theirs[key], tensor)


@pytest.mark.parametrize("mode", [pytest.param("live", marks=pytest.mark.full), "swappable"])
def test_onnx(mode: str, device: torch.device, tmp_path: Path) -> None:
    import onnxruntime

    here, found = operated(small_model("qwen3")), operated(there(device, "qwen3"))
    export(found.model, "onnx", tmp_path / "model.onnx", example_inputs=found.inputs, mode=mode)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    given = {name: tensor.numpy() for name, tensor in here.inputs.items()}
    assert_close(torch.from_numpy(session.run(None, given)[0]), here.run())
    export_core(found.model, tmp_path / "core.onnx_adapter")
    export_core(found.model.to("cpu"), tmp_path / "other.onnx_adapter")
    assert (tmp_path / "core.onnx_adapter").read_bytes() == (tmp_path / "other.onnx_adapter").read_bytes()


@pytest.mark.parametrize("mode", ["live", "folded", "merged"])
@pytest.mark.parametrize("name", HOSTS)
def test_compiled(name: str, mode: str, device: torch.device) -> None:
    found = operated(there(device, name))
    program: Any = compiled(found.model, found.inputs, mode=mode, backend="eager")
    for coeff in (1.0, 0.3):
        set_coeff(found.model, 1.0 if mode == "merged" else coeff)
        set_coeff(program, coeff) if mode != "merged" else None
        assert_close(found.run(program).cpu(), found.run().cpu())
