"""What exports and their commands refuse: early, and by the names that the user gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import exporters.cli
from exporters import ExportError, export_core, merge_checkpoint
from exporters.shared.publish import staged
from surgery import AdapterError, InputError, SurgeryError, apply_surgery, load_adapter, save_adapter
from tests.support.command_line import run
from tests.support.zoo import small_model


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    model = small_model("qwen3").model
    model.save_pretrained(tmp_path / "base")
    save_adapter(apply_surgery(model, "antipasto", r=2, progress=False), tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the command fail, where it comes to load a model."""

    def load(source: str) -> Any:
        raise AssertionError(f"{source} was loaded")

    monkeypatch.setattr(exporters.cli, "_load", load)


def test_swapped_folders_of_a_merge_are_named(folders, tmp_path):
    base, adapter = folders
    with pytest.raises(ExportError, match=r"is an adapter and .* a checkpoint: the order is base_dir, adapter_dir"):
        merge_checkpoint(adapter, base, tmp_path / "out", progress=False)
    with pytest.raises(ExportError, match=r"adapter_dir=.* is a model's checkpoint and no adapter"):
        merge_checkpoint(tmp_path / "out", base, adapter, progress=False)
    with pytest.raises(ExportError, match=r"base_dir=.* is an adapter and no checkpoint"):
        merge_checkpoint(adapter, adapter, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_in_the_place_of_an_adapter_is_called_one(folders):
    with pytest.raises(AdapterError, match="is a model's checkpoint; expected an adapter"):
        load_adapter(small_model("qwen3").model, folders[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "onx"], "unknown format 'onx'"),
        (["--format", "onnx", "--mode", "liv"], "mode must be one of"),
        (["--format", "dense", "--opset", "20"], "format 'dense' has no option opset"),
        (["--format", "onnx", "--adapter", "missing"], "'missing' is not a directory"),
    ],
)
def test_what_is_wrong_is_refused_before_a_model_is_loaded(arguments, words, tmp_path, no_model):
    with pytest.raises(SurgeryError, match=words):
        run("export", "model", tmp_path / "out", *arguments)


def test_a_place_that_is_taken_is_refused_before_a_model_is_loaded(folders, no_model):
    with pytest.raises(ExportError, match="must be a new or empty directory"):
        run("export", "model", folders[0], "--format", "dense")


def test_a_coefficient_that_is_no_number_is_refused_before_a_model_is_loaded(folders, tmp_path, no_model):
    with pytest.raises(InputError, match="--coeff must be a finite number, found nan"):
        run("export", "m", tmp_path / "o", "--format", "dense", "--adapter", folders[1], "--coeff", "nan")


@pytest.mark.parametrize("source", ["./missing", "missing/", "a/b/c", "C:\\models\\missing", ""])
def test_a_missing_folder_is_no_hub_name(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", lambda *_: pytest.fail("it was looked up"))
    words = "there is no such folder, and no model on the Hub can have that name"
    with pytest.raises(InputError, match=words):
        run("export", source, tmp_path / "out", "--format", "dense")


def test_a_folder_without_a_model_says_what_it_holds(folders, tmp_path):
    with pytest.raises(InputError, match=r"holds an adapter, and no model; expected one with a config.json"):
        run("export", folders[1], tmp_path / "out", "--format", "dense")
    with pytest.raises(InputError, match="is a file; expected a folder"):
        run("export", folders[1] / "adapter_config.json", tmp_path / "out", "--format", "dense")


def test_a_refused_core_names_the_path_that_was_given(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper, save

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])  # fmt: skip
    save(helper.make_model(graph), tmp_path / "graph.onnx")
    other = [f"0.core.h@{'0' * 12}"]
    core = helper.make_tensor(other[0], TensorProto.FLOAT, [1], [0.0])
    graph.initializer.append(core)
    graph.input.append(helper.make_tensor_value_info(other[0], TensorProto.FLOAT, [1]))
    save(helper.make_model(graph), tmp_path / "graph.onnx")
    model = apply_surgery(nn.Sequential(nn.Linear(6, 8)), "antipasto", r=4, progress=False)
    target = tmp_path / "mine.onnx_adapter"
    with pytest.raises(ExportError, match="does not fit") as caught:
        export_core(model, target, onnx_path=tmp_path / "graph.onnx")
    assert str(target) in str(caught.value)
    assert ".tmp" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.xyz", None])
def test_an_error_of_a_format_names_the_target(name, tmp_path):
    with pytest.raises(ExportError) as caught, staged(tmp_path / "out", name) as (written, target):
        raise ExportError(f"cannot read {str(written)!r}")
    assert str(caught.value) == f"cannot read {str(target)!r}"
    with pytest.raises(ExportError, match="cannot write") as caught, staged(tmp_path / "out", name) as (written, _):
        (written / "missing" / "file").write_text("")
    assert ".tmp" not in str(caught.value)
