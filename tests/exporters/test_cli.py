"""The exporters' commands, on an application that is made here of the very functions that the entry points name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from exporters import ExportError, export, formats
from exporters.cli import options
from surgery import AdapterError, InputError, WeightError, apply_surgery, save_adapter, set_coeff
from tests.support.checkpoints import assert_same_tensors, disturb
from tests.support.command_line import run
from tests.support.zoo import small_model


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, transformers.PreTrainedModel]:
    small_model("qwen3").model.save_pretrained(tmp_path / "base")
    model = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "base")
    apply_surgery(model, "antipasto", r=4, target_modules=["up_proj", "lm_head"], progress=False)
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model


def test_help_lists_every_format_and_option() -> None:
    text = re.sub(r"[\s│]+", " ", run("export", "--help"))
    for format in formats():
        assert f"{format}: " in text or not [o for o in options() if f"{format}:" in options()[o][1]]
        assert format in text
    for name in options():
        assert f"--{name.replace('_', '-')}" in text
    assert {"mode", "opset", "untie", "max_shard_size"} <= options().keys()
    assert options()["opset"][0] is int
    assert options()["untie"] == (bool, "dense: give a site whose weight is shared with another module a weight of "
                                        "its own.")  # fmt: skip
    assert options()["max_shard_size"][0] is str
    kind, text = options()["mode"]
    assert kind is str
    assert "onnx: merge the adapter" in text
    assert "merged, live, swappable (default: merged)." in text
    assert "tokenizer" not in options()  # no flag for what is no number and no text


def test_export_of_a_model_with_an_adapter(folders, tmp_path: Path) -> None:
    base, adapter, model = folders
    out = run("export", base, tmp_path / "out", "--adapter", adapter, "--coeff", "0.5", "--format", "dense", "--untie",
              "--max-shard-size", "20KB")  # fmt: skip
    assert "wrote" in out
    set_coeff(model, 0.5)
    export(model, "dense", tmp_path / "same", untie=True, max_shard_size="20KB")
    assert_same_tensors(tmp_path / "out", tmp_path / "same")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_export_of_a_plain_model(folders, tmp_path: Path) -> None:
    base, *_ = folders
    run("export", base, tmp_path / "out", "--format", "dense")
    assert_same_tensors(tmp_path / "out", base)


def test_merge(folders, tmp_path: Path) -> None:
    base, adapter, model = folders
    assert "sites in 1 files" in run("merge", base, adapter, tmp_path / "out", "--untie", "--no-progress")
    export(model, "dense", tmp_path / "same", untie=True)
    assert_same_tensors(tmp_path / "out", tmp_path / "same")
    run("merge", base, adapter, tmp_path / "zero", "--untie", "--coeff", "0", "--no-progress")
    stored = load_file(tmp_path / "zero" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_expected_errors_are_typed(folders, tmp_path: Path) -> None:
    base, adapter, _ = folders
    with pytest.raises(WeightError, match="untie"):
        run("merge", base, adapter, tmp_path / "out", "--no-progress")
    with pytest.raises(ExportError, match="no option opset"):
        run("export", base, tmp_path / "out", "--format", "dense", "--opset", "18")
    with pytest.raises(ExportError, match="unknown format"):
        run("export", base, tmp_path / "out", "--format", "dens")
    with pytest.raises(AdapterError, match="not a directory"):
        run("export", base, tmp_path / "out", "--format", "dense", "--adapter", tmp_path / "none")
    with pytest.raises(InputError, match="cannot find a model"):
        run("export", tmp_path / "none", tmp_path / "out", "--format", "dense")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "base"]
