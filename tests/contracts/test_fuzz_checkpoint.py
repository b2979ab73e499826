"""Damaged and hostile checkpoints, journals, statistics and cores: a typed error, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from exporters import ExportError, check_core, export_core, merge_checkpoint
from exporters.checkpoint.journal import JOURNAL
from exporters.checkpoint.plan import plan_merge
from exporters.onnx.cores import core_slots, read_core
from surgery import AdapterError, InputError, Statistics, apply_surgery, calibrate, save_adapter, sites
from surgery.storage.adapter_file import open_adapter
from tests.support.adapter_files import bare_tensors, configuration
from tests.support.fuzz import MANY, SOME, damaged_bytes, damaged_json, outcome, safetensors_file, written
from tests.support.model_state import state_of
from tests.support.operated_models import operated
from tests.support.zoo import small_model

MEMORY = 2**29
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain checkpoint, one of transformers, and an adapter for each."""
    root = tmp_path_factory.mktemp("good")
    found = operated("mlp")
    save_adapter(found.model, root / "adapter")
    (root / "base").mkdir()
    state = small_model("mlp").model.state_dict()
    files = {"a.safetensors": ("0.weight", "0.bias"), "b.safetensors": ("2.weight", "4.weight", "4.bias")}
    for name, keys in files.items():
        save_file({key: state[key] for key in keys}, root / "base" / name)
    weight_map = {key: name for name, keys in files.items() for key in keys}
    (root / "base" / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    model = small_model("qwen3").model
    model.save_pretrained(root / "hub")
    apply_surgery(model, "antipasto", r=2, target_modules=["up_proj"], progress=False)
    save_adapter(model, root / "hub_adapter")
    return {path.name: path for path in root.iterdir()}


def copied(folder: Path, to: Path, **changed: bytes) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    for name, data in changed.items():
        (to / name.replace("__", ".")).write_bytes(data)
    return to


def check_merge(base: Path, adapter: Path, out: Path, *, memory: int | None = None) -> ExportError | None:
    """Merge; on failure nothing may be left, and neither input may be touched."""
    before = {file: file.read_bytes() for folder in (base, adapter) for file in folder.iterdir() if file.is_file()}
    others = sorted(path for path in out.parent.iterdir() if not path.name.endswith(".merging"))
    error: Any = outcome(lambda: merge_checkpoint(base, adapter, out, progress=False), memory=memory, seconds=60)
    assert {file: file.read_bytes() for file in before} == before
    if error is not None:
        assert sorted(out.parent.iterdir()) == others
    else:
        shutil.rmtree(out)
    return error


def test_what_is_good_is_merged(folders, tmp_path):
    assert check_merge(folders["base"], folders["adapter"], tmp_path / "out") is None
    assert check_merge(folders["hub"], folders["hub_adapter"], tmp_path / "out") is None


@SOME
@given(data=st.data(), kind=st.sampled_from(("index", "index bytes", "tensors", "configuration", "adapter")))
def test_a_damaged_checkpoint_or_adapter(data, kind, folders, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("x")
    base, adapter = copied(folders["base"], tmp_path / "base"), copied(folders["adapter"], tmp_path / "adapter")
    if kind == "index":
        (base / INDEX).write_text(json.dumps(data.draw(damaged_json(json.loads((base / INDEX).read_bytes())))))
    elif kind == "index bytes":
        (base / INDEX).write_bytes(data.draw(damaged_bytes((base / INDEX).read_bytes())))
    elif kind == "tensors":
        (base / "a.safetensors").write_bytes(data.draw(damaged_bytes((base / "a.safetensors").read_bytes())))
    elif kind == "configuration":
        (base / "config.json").write_bytes(json.dumps(data.draw(damaged_json({"a": [1, {}], "b": "x"}))).encode())
    else:
        config, tensors = configuration(adapter), bare_tensors(adapter)
        written(adapter, data.draw(damaged_json(config)), tensors, older=data.draw(st.booleans()))
    check_merge(base, adapter, tmp_path / "out")
    shutil.rmtree(tmp_path)


@SOME
@given(data=st.data())
def test_a_damaged_configuration_of_a_transformers_model(data, folders, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("x")
    config = json.loads((folders["hub"] / "config.json").read_bytes())
    text = json.dumps(data.draw(damaged_json(config))).encode()
    base = copied(folders["hub"], tmp_path / "base", config__json=text)
    check_merge(base, folders["hub_adapter"], tmp_path / "out")
    shutil.rmtree(tmp_path)


CONFIGS: dict[str, dict[str, Any]] = {
    "layers without end": {"num_hidden_layers": 10**9, "layer_types": None},
    "labels without end": {"num_labels": 10**9},
    "sizes beyond 64 bits": {"hidden_size": 2**70},
    "sizes whose product overflows": {"hidden_size": 2**40, "intermediate_size": 2**40},
    "an architecture that is no model": {"architectures": ["Trainer"]},
    "an architecture that is a function": {"architectures": ["pipeline"]},
    "an architecture that is a number": {"architectures": [5]},
    "another architecture": {"architectures": ["BertModel"]},
    "code that comes with it": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}},
    "code beside a known architecture": {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
    "an attention that is downloaded": {"_attn_implementation": "someone/kernel", "attn_implementation": "someone/k"},
    "a model type that is a path": {"model_type": "../../x"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_configuration_of_a_transformers_model(name, folders, tmp_path):
    config = json.loads((folders["hub"] / "config.json").read_bytes()) | CONFIGS[name]
    base = copied(folders["hub"], tmp_path / "base", config__json=json.dumps(config).encode())
    (base / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'marker')!r})\n")
    check_merge(base, folders["hub_adapter"], tmp_path / "out", memory=2**30)
    assert not (tmp_path / "marker").exists()


ELSEWHERE = [
    "../evil.safetensors", "/tmp/evil.safetensors", "a/b.safetensors", "..\\x.safetensors", ".hidden.safetensors",
    "x.bin", "", ".", "a\n.safetensors/", "\ud800.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_that_leads_elsewhere(name, folders, tmp_path):
    index = {"weight_map": {"0.weight": name}}
    base = copied(folders["base"], tmp_path / "base")
    (base / INDEX).write_text(json.dumps(index))
    shutil.copyfile(base / "a.safetensors", tmp_path / "evil.safetensors")
    assert isinstance(check_merge(base, folders["adapter"], tmp_path / "out"), ExportError)


def test_a_checkpoint_with_sizes_that_no_tensor_has(folders, tmp_path):
    for shape in ([0, 2**62, 2**62], [0, 2**63], [2**31, 0, 2**31]):
        header = {"0.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
        base = copied(folders["base"], tmp_path / "base", a__safetensors=safetensors_file(header))
        assert isinstance(check_merge(base, folders["adapter"], tmp_path / "out", memory=MEMORY), ExportError)


# what a killed run left, as somebody else may have changed it: never used where it does not fit, never written through


def left_behind(folders: dict[str, Path], out: Path, lines: bytes) -> Path:
    """The folder of a run that was killed, with this journal behind its first line."""
    with open_adapter(folders["adapter"]) as file:
        digest = plan_merge(folders["base"], folders["adapter"], file.config, 1.0, False).digest
    staging = out.parent / f".{out.name}.merging"
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "files").mkdir(parents=True)
    (staging / JOURNAL).write_bytes(json.dumps({"run": digest}).encode() + b"\n" + lines)
    return staging


def assert_merged(folders: dict[str, Path], out: Path) -> None:
    whole = out.parent / "whole"
    merge_checkpoint(folders["base"], folders["adapter"], whole, progress=False)
    for file in whole.glob("*.safetensors"):
        first, second = load_file(file), load_file(out / file.name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    shutil.rmtree(whole)


JOURNALS = [
    b"[1]", b'{"x": "y"}', b'{"x": null}', b'{"group 0.weight": NaN}', b'{"group 0.weight": -1.0}', b"[" * 10**5,
    b"\xff\xfe",
    b'{"a": 1.0, "a": 2.0}', b"{}\n{", b'"x"', b"5", b'{"file nothing": 0.0}', b'{"group nothing": 1e999}', bytes(1000),
]  # fmt: skip


@pytest.mark.parametrize("lines", JOURNALS)
def test_a_damaged_journal_is_not_believed(lines, folders, tmp_path):
    left_behind(folders, tmp_path / "out", lines)
    error = outcome(lambda: merge_checkpoint(folders["base"], folders["adapter"], tmp_path / "out", progress=False))
    assert error is None
    assert_merged(folders, tmp_path / "out")


@SOME
@given(data=st.data())
def test_a_journal_of_damaged_bytes(data, folders, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("x")
    staging = left_behind(folders, tmp_path / "out", b"")
    text = (staging / JOURNAL).read_bytes() + b'{"file a.safetensors": 0.0}\n{"group 0.weight": 0.0}'
    (staging / JOURNAL).write_bytes(data.draw(damaged_bytes(text)))
    if check_merge(folders["base"], folders["adapter"], tmp_path / "out") is not None:
        assert not staging.exists()
    shutil.rmtree(tmp_path)


def test_links_among_what_a_kill_left_are_not_written_through(folders, tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    staging = left_behind(folders, tmp_path / "out", b'{"file a.safetensors": 0.0}\n{"file b.safetensors": 0.0}')
    for name in ("a.safetensors", "b.safetensors"):
        os.symlink(tmp_path / "victim", staging / "files" / name)
    merge_checkpoint(folders["base"], folders["adapter"], tmp_path / "out", progress=False)
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert_merged(folders, tmp_path / "out")


@pytest.mark.parametrize("kind", ["link", "file", "fifo", "journal is a fifo", "files is a link"])
def test_something_else_in_the_place_of_what_a_kill_left(kind, folders, tmp_path):
    staging = left_behind(folders, tmp_path / "out", b"")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_bytes(b"precious")
    if kind == "journal is a fifo":
        (staging / JOURNAL).unlink()
        os.mkfifo(staging / JOURNAL)
    elif kind == "files is a link":
        (staging / "files").rmdir()
        os.symlink(tmp_path / "victim", staging / "files")
    else:
        os.rename(staging, tmp_path / "victim" / "staging")
        if kind == "link":
            os.symlink(tmp_path / "victim" / "staging", staging)
        elif kind == "file":
            staging.write_bytes(b"of somebody")
        else:
            os.mkfifo(staging)
    error = outcome(lambda: merge_checkpoint(folders["base"], folders["adapter"], tmp_path / "out", progress=False))
    assert error is None or isinstance(error, ExportError)
    assert (tmp_path / "victim" / "precious").read_bytes() == b"precious"
    assert sorted(p.name for p in (tmp_path / "victim").iterdir() if p.name != "staging") == ["precious"]
    if kind == "file":
        assert staging.read_bytes() == b"of somebody"


# statistics


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    found = small_model("mlp")
    data = [torch.randn(64, 12)]
    path = calibrate(found.model, "antipasto", data, progress=False).save(tmp_path_factory.mktemp("s") / "file")
    return path.read_bytes()


def check_statistics(data: bytes, path: Path) -> AdapterError | None:
    """Read statistics, and use what was read: a typed error, and the model as it was."""
    path.write_bytes(data)
    model = small_model("mlp").model
    before = state_of(model)
    found: list[Statistics] = []
    error: Any = outcome(lambda: found.append(Statistics.load(path)), memory=MEMORY)
    assert error is None or isinstance(error, AdapterError)
    if found:
        outcome(lambda: found[0] + found[0])
        outcome(lambda: found[0].save(path))
        used = outcome(lambda: apply_surgery(model, "antipasto", r=2, calibration=found[0], progress=False))
        if used is not None:
            assert sites(model) == {}
            assert state_of(model) == before
    return error


@MANY
@given(data=st.data())
def test_statistics_of_damaged_bytes(data, statistics, tmp_path_factory):
    check_statistics(data.draw(damaged_bytes(statistics)), tmp_path_factory.getbasetemp() / "statistics")


@MANY
@given(data=st.data())
def test_statistics_of_a_damaged_description(data, statistics, tmp_path_factory):
    size = 8 + int.from_bytes(statistics[:8], "little")
    header = json.loads(statistics[8:size])
    content = data.draw(damaged_json(json.loads(header["__metadata__"]["content"])))
    header["__metadata__"]["content"] = json.dumps(content)
    check_statistics(safetensors_file(header, statistics[size:]), tmp_path_factory.getbasetemp() / "statistics")


def test_good_statistics_are_taken(statistics, tmp_path):
    assert check_statistics(statistics, tmp_path / "x") is None
    with pytest.raises(InputError, match="is no path"):
        Statistics.load(tmp_path / "x").save("\0")


# cores for ONNX Runtime


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, Path]:
    """A core, and a graph that takes it: its declarations, which is all that is compared."""
    folder, model = tmp_path_factory.mktemp("core"), operated("mlp").model
    export_core(model, folder / "x.onnx_adapter")
    values = {name: slot.value().numpy() for name, slot in core_slots(model).items()}
    inputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, v.shape) for n, v in values.items()]
    held = [onnx.numpy_helper.from_array(v, n) for n, v in values.items()]
    graph = onnx.helper.make_model(onnx.helper.make_graph([], "g", inputs, [], held))
    onnx.save(graph, folder / "x.onnx")
    return (folder / "x.onnx_adapter").read_bytes(), (folder / "x.onnx").read_bytes(), folder


@MANY
@given(data=st.data(), which=st.sampled_from((0, 1)))
def test_a_damaged_core_or_graph(data, which, core):
    files = list(core[:2])
    files[which] = data.draw(damaged_bytes(files[which]))
    paths = [core[2] / "d.onnx_adapter", core[2] / "d.onnx"]
    for path, found in zip(paths, files, strict=True):
        path.write_bytes(found)
    error = outcome(lambda: check_core(paths[1], paths[0]), memory=2**30)
    assert error is None or isinstance(error, ExportError)


def test_a_core_that_declares_more_than_it_holds(core):
    """Every number in the file that could be a size, made large: what is read is within the file."""
    good, graph, folder = core
    (folder / "g.onnx").write_bytes(graph)
    for i in range(0, len(good) - 8, 4):
        if int.from_bytes(good[i : i + 8], "little") in (6, 12, 16):
            for size in (1, 17, 2**20, 2**40, 2**62, 2**64 - 1):
                (folder / "e.onnx_adapter").write_bytes(good[:i] + size.to_bytes(8, "little") + good[i + 8 :])
                assert outcome(lambda: check_core(folder / "g.onnx", folder / "e.onnx_adapter"), memory=2**30)
    (folder / "g.onnx_adapter").write_bytes(good)
    check_core(folder / "g.onnx", folder / "g.onnx_adapter")
    assert all(np.isfinite(value).all() for value in read_core(folder / "g.onnx_adapter").values())


@pytest.mark.parametrize("place", ["../../etc/passwd", "/etc/passwd", "a/../../x", "C:\\x", "..\\x"])
def test_a_graph_that_points_outside_of_its_folder(place, core):
    graph = onnx.load_from_string(core[1])
    tensor = graph.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value=place)
    (core[2] / "out.onnx").write_bytes(graph.SerializeToString())
    (core[2] / "good.onnx_adapter").write_bytes(core[0])
    error = outcome(lambda: check_core(core[2] / "out.onnx", core[2] / "good.onnx_adapter"))
    assert "points outside of the folder" in str(error)


@pytest.mark.full
def test_no_damage_to_a_core_ends_the_process(core):
    """In a process of its own, since a fault of the runtime's reader would end it."""
    (core[2] / "seed.onnx_adapter").write_bytes(core[0])
    code = """
import random, sys
from exporters.onnx.cores import read_core
from passes.errors import ExportError
good, chance, refused = open("seed.onnx_adapter", "rb").read(), random.Random(0), 0
for _ in range(20_000):
    data = bytearray(good)
    for _ in range(chance.randrange(1, 4)):
        i = chance.randrange(len(data))
        data[i:i + chance.choice((0, 1, 4))] = chance.choice((b"\\xff" * 4, bytes(4), chance.randbytes(4)))
    open("bad.onnx_adapter", "wb").write(data)
    try:
        read_core("bad.onnx_adapter")
    except ExportError:
        refused += 1
print(refused)
"""
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], cwd=core[2], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 15_000
