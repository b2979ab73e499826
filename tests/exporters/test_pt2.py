"""A ``.pt2``: agrees with PyTorch in a process with torch alone, steers, takes other cores, refuses what is wrong."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from exporters import ExportError, export, swap
from exporters.shared.archive import _Sink
from surgery import (
    AdapterError,
    InputError,
    VariantError,
    apply_surgery,
    save_adapter,
    set_coeff,
    sites,
    steer,
    to_graph,
)
from surgery.variants import REGISTRY
from tests.support.expert_models import IDS
from tests.support.expert_models import operated as stacked
from tests.support.fresh import run_fresh
from tests.support.onnx_models import operated
from tests.support.program_models import first, shaken, with_variant
from tests.support.shared_exports import SharedExports
from tests.support.tolerance import assert_close, relative_error
from tests.support.zoo import Forward, SmallModel, full, small_model

NAMES = ["mlp", "raw", "attention", "encoder_layer", "qwen3", *full("gpt2", "bert", "vit", "t5", "llama")]
LINEAR = sorted(name for name, cls in REGISTRY.items() if cls.linear)


def load(path: Path) -> Any:
    return torch.export.load(path).module()


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["merged", "live"])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_and_steers(name: str, mode: str, exported: SharedExports) -> None:
    p, report = exported(operated, name, mode, "pt2")
    assert report.files == (report.path,)
    assert report.path.name == "m.pt2"
    assert 0 <= report.max_error < 1e-5
    assert "wrong" not in report.details["sizes"].values()
    program = load(report.path)
    assert_close(first(program, p.inputs), p.run())
    for coeff in (0.0, -0.5, 1.5) if mode == "live" else ():
        program.coeff.fill_(coeff)
        with steer(p.model, coeff):
            assert_close(first(program, p.inputs), p.run())


@pytest.mark.parametrize("name", ["mlp", "attention", *full("qwen3")])
def test_merged_has_no_trace_of_the_adapter(name: str, exported: SharedExports) -> None:
    _, report = exported(operated, name, "merged", "pt2")
    with zipfile.ZipFile(report.path) as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert not [
        word for word in (b"coeff", b"factors", b"sspace", b"surgery", b".core", b"aten.elu") if word in everything
    ]


@pytest.mark.parametrize("mode", ["merged", "live"])
def test_holds_no_path_no_example_and_is_reproducible(mode: str, tmp_path: Path) -> None:
    p = operated("mlp")
    data = [export(p.model, "pt2", tmp_path / f"{i}" / "m.pt2", mode=mode, example_inputs=p.inputs) for i in range(2)]
    assert data[0].path.read_bytes() == data[1].path.read_bytes()
    with zipfile.ZipFile(data[0].path) as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert b"site-packages" not in everything
    assert str(Path(__file__).parents[2]).encode() not in everything
    assert p.inputs.numpy().tobytes() not in everything


@pytest.mark.parametrize("name", ["mlp", *full("qwen3")])
def test_graph_modules_export_as_their_models_do(name: str, tmp_path: Path) -> None:
    p = operated(name)
    graph = to_graph(p.model, p.inputs, fuse=True)
    for mode in ("merged", "live"):
        report = export(graph, "pt2", tmp_path / f"{mode}.pt2", mode=mode, example_inputs=p.inputs)
        assert_close(first(load(report.path), p.inputs), p.run())
    program = load(report.path)
    program.coeff.fill_(-0.5)
    with steer(p.model, -0.5):
        assert_close(first(program, p.inputs), p.run())
    assert not [name for name in program.state_dict() if name.startswith("inner")]
    other = shaken(operated(name))
    swap(program, other.model, coeff=1.0)
    assert_close(first(program, p.inputs), other.run())


@pytest.mark.parametrize("variant", sorted(REGISTRY))
def test_every_variant_lives_and_takes_another_core(variant: str, tmp_path: Path) -> None:
    p = with_variant(variant)
    path = export(p.model, "pt2", tmp_path / "m.pt2", mode="live", example_inputs=p.inputs).path
    if variant not in LINEAR:
        with pytest.raises(VariantError, match="not linear"):
            export(p.model, "pt2", tmp_path / "merged.pt2", example_inputs=p.inputs)
    other = shaken(p, seed=3)
    save_adapter(other.model, tmp_path / "adapter")
    program = load(path)
    swap(program, tmp_path / "adapter", coeff=0.5)
    with steer(other.model, 0.5):
        assert_close(first(program, p.inputs), other.run())


@pytest.mark.parametrize("mode", ["merged", "live"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", *full("gpt2")])
def test_dtypes(name: str, dtype: torch.dtype, mode: str, tmp_path: Path) -> None:
    p = operated(name, dtype)
    path = export(p.model, "pt2", tmp_path / "m.pt2", mode=mode, example_inputs=p.inputs).path
    assert_close(first(load(path), p.inputs), p.run(), dtype)


@pytest.mark.parametrize("name", ["mlp", "qwen3", *full("t5")])
def test_loads_with_torch_alone_and_takes_a_core_there(name: str, tmp_path: Path, exported: SharedExports) -> None:
    p, report = exported(operated, name, "live", "pt2")
    shutil.copy(report.path, tmp_path)
    other = shaken(operated(name))
    save_adapter(other.model, tmp_path / "adapter")
    named = p.inputs if isinstance(p.inputs, dict) else {"input": p.inputs}
    save_file(named, tmp_path / "inputs.safetensors")
    run_fresh(
        """
inputs = load_file("inputs.safetensors")
program = torch.export.load("m.pt2").module()
def run():
    out = program(inputs["input"]) if "input" in inputs else program(**inputs)["logits"]
    return out.contiguous()
found = {"one": run()}
program.coeff.fill_(-0.5)
found["steered"] = run()
program.coeff.fill_(1.0)
for name, value in load_file("adapter/adapter_model.safetensors").items():
    if ".core." in name:
        program.get_parameter(name).copy_(value)
found["other"] = run()
save_file(found, "found.safetensors")
assert not [m for m in sys.modules if m.partition(".")[0] in ("surgery", "transformers")]
""",
        tmp_path,
    )
    found = load_file(tmp_path / "found.safetensors")
    assert_close(found["one"], p.run())
    assert_close(found["other"], other.run())
    with steer(p.model, -0.5):
        assert_close(found["steered"], p.run())


def test_sizes_are_free_names_are_the_models_own_and_ties_stay_ties(exported: SharedExports) -> None:
    p, report = exported(operated, "qwen3", "live", "pt2")
    assert report.details["sizes"] == {"batch": "free", "sequence": "free"}
    program = load(report.path)
    ids = torch.randint(0, 64, (3, 13))
    other = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_close(first(program, other), p.run(inputs=other))
    tensors = program.state_dict(keep_vars=True)
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()
    assert {f"{key}.core.g" for key in sites(p.model)} <= set(tensors)
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    assert report.path.stat().st_size < 1.5 * sum(stored.values()) + 10**6


@pytest.mark.full
@pytest.mark.parametrize("mode", ["merged", "live"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_stacked_experts_need_nothing_but_torch(name: str, mode: str, tmp_path: Path) -> None:
    p = shaken(SmallModel(name, stacked(name), {"input_ids": IDS}))
    report = export(p.model, "pt2", tmp_path / "m.pt2", mode=mode, example_inputs=p.inputs)
    assert report.details["foreign_operations"] == []
    assert_close(first(load(report.path), p.inputs), p.run())
    assert p.model.config._experts_implementation != "batched_mm"


def test_default_inputs_and_a_batch_of_one(tmp_path: Path) -> None:
    p = operated("gpt2", layers=1)
    export(p.model, "pt2", tmp_path / "a.pt2")
    one = {"input_ids": torch.randint(0, 64, (1, 5))}
    report = export(p.model, "pt2", tmp_path / "b.pt2", example_inputs=one)
    assert report.details["sizes"]["batch"] == "free"


@pytest.mark.parametrize("mode", ["merged", "live"])
def test_export_leaves_the_model_as_it_was(mode: str, tmp_path: Path) -> None:
    p = operated("qwen3", layers=1)
    set_coeff(p.model, 0.7)
    p.model.train()
    tensors = {name: (id(t), t.clone()) for name, t in p.model.state_dict(keep_vars=True).items()}
    modules = [
        (name, id(m), type(m), m.training, sorted(vars(m)), sorted(m._buffers)) for name, m in p.model.named_modules()
    ]
    export(p.model, "pt2", tmp_path / "m.pt2", mode=mode, example_inputs=p.inputs)
    assert modules == [
        (name, id(m), type(m), m.training, sorted(vars(m)), sorted(m._buffers)) for name, m in p.model.named_modules()
    ]
    for name, tensor in p.model.state_dict(keep_vars=True).items():
        assert id(tensor) == tensors[name][0]
        assert torch.equal(tensor, tensors[name][1])
    assert {site.steering.coeff.item() for site in sites(p.model).values()} == {torch.tensor(0.7).item()}
    if mode == "merged":
        p.model.eval()
        assert_close(first(load(tmp_path / "m.pt2"), p.inputs), p.run())


def test_containers_of_outputs(tmp_path: Path) -> None:
    def several(self: Any, x: torch.Tensor) -> Any:
        y = self.linear(x)
        return {"y": y, "more": [x + y, (y, None)]}

    model = Forward(several, linear=nn.Linear(4, 4))
    x = torch.randn(3, 4)
    program = load(export(model, "pt2", tmp_path / "m.pt2", example_inputs=x).path)
    found = program(x)
    assert list(found) == ["y", "more_0", "more_1_0"]
    assert_close(found["more_0"], x + found["y"])
    with pytest.raises(ExportError, match="returns a set"):
        export(Forward(lambda self, x: {1, 2}), "pt2", tmp_path / "n.pt2", example_inputs=x)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), coeff=st.floats(-2, 2, width=32))
def test_any_core_any_coeff_any_batch(live_mlp: Any, seed: int, rows: int, coeff: float) -> None:
    p, program = live_mlp
    shaken(p, seed)
    swap(program, p.model, coeff=coeff)
    x = torch.randn(rows, 12)
    with steer(p.model, coeff):
        assert_close(first(program, x), p.run(inputs=x))


@pytest.fixture(scope="module")
def live_mlp(exported: SharedExports) -> Any:
    p, report = exported(operated, "mlp", "live", "pt2")
    return p, load(report.path)


def test_swap_refuses_an_adapter_of_another_model_and_changes_nothing(live_mlp: Any, tmp_path: Path) -> None:
    p, program = live_mlp
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    another = small_model("mlp", seed=1)
    apply_surgery(another.model, "antipasto", r=6, example_inputs=p.inputs, progress=False)
    with pytest.raises(AdapterError, match="another base weight"):
        swap(program, another.model, coeff=0.25)
    save_adapter(another.model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="another base weight"):
        swap(program, tmp_path / "adapter")
    for variant, r, targets, message in (
        ("lora_xs", 6, None, "variant is 'lora_xs'"),
        ("antipasto", 4, None, "r is 4, the program has 6"),
        ("antipasto", 6, ["0"], "in the program and not in the adapter"),
        (surgery.AntiPaSTO(r=6, suppress_only=True), 6, None, "suppress_only is True, the program has False"),
    ):
        other = small_model("mlp")
        apply_surgery(other.model, variant, r=r, target_modules=targets, example_inputs=p.inputs, progress=False)
        with pytest.raises(AdapterError, match=message):
            swap(program, other.model)
    other = operated("mlp")
    sites(other.model)["0"].core.g.data[0] = float("nan")
    with pytest.raises(AdapterError, match="not finite"):
        swap(program, other.model)
    with pytest.raises(AdapterError, match="not a directory"):
        swap(program, tmp_path / "nothing")
    with pytest.raises(InputError, match="finite number"):
        swap(program, coeff=float("inf"))
    with pytest.raises(ExportError, match="holds no adapter"):
        swap(nn.Linear(2, 2), coeff=0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())


class Twice(nn.Module):
    """One module under three names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)] * 2)
        self.again = self.layers[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(torch.relu(self.layers[1](x))) + self.layers[0](x)


def test_swap_reaches_a_module_with_several_names(tmp_path: Path) -> None:
    p = SmallModel("twice", Twice().eval(), torch.randn(3, 8))
    apply_surgery(p.model, "antipasto", r=4, example_inputs=p.inputs, progress=False)
    program = load(export(p.model, "pt2", tmp_path / "m.pt2", mode="live", example_inputs=p.inputs).path)
    before = p.run()
    swap(program, shaken(p).model)
    assert relative_error(p.run(), before) > 1e-2
    assert_close(first(program, p.inputs), p.run())


def test_swap_takes_other_factors_along(tmp_path: Path) -> None:
    p = operated("mlp")
    program = load(export(p.model, "pt2", tmp_path / "m.pt2", mode="live", example_inputs=p.inputs).path)
    other = small_model("mlp")
    calibration = [torch.randn(64, 12) * torch.linspace(0, 3, 12)]
    apply_surgery(other.model, "antipasto", r=6, calibration=calibration, example_inputs=p.inputs, progress=False)
    shaken(other)
    swap(program, other.model)
    assert_close(first(program, p.inputs), other.run())


def test_refusals(tmp_path: Path) -> None:
    p = operated("mlp")
    with pytest.raises(ExportError, match="mode must be one of 'merged', 'live'; found 'fast'"):
        export(p.model, "pt2", tmp_path / "m.pt2", mode="fast", example_inputs=p.inputs)
    with pytest.raises(ExportError, match="carries none"):
        export(small_model("mlp").model, "pt2", tmp_path / "m.pt2", mode="live", example_inputs=p.inputs)
    with pytest.raises(InputError, match="needs example_inputs"):
        export(p.model, "pt2", tmp_path / "m.pt2")
    with pytest.raises(InputError, match="does not run"):
        export(p.model, "pt2", tmp_path / "m.pt2", example_inputs=torch.randn(2, 99))
    graph = surgery.fold(to_graph(p.model, p.inputs), freeze_coeff=True)
    with pytest.raises(ExportError, match="folded into a constant"):
        export(graph, "pt2", tmp_path / "m.pt2", mode="live", example_inputs=p.inputs)
    p.model.coeff = 1
    with pytest.raises(ExportError, match="attribute 'coeff' of its own"):
        export(p.model, "pt2", tmp_path / "m.pt2", mode="live", example_inputs=p.inputs)
    branch = Forward(lambda self, x: self.linear(x) if x.sum() > 0 else x, linear=nn.Linear(4, 4))
    with pytest.raises(ExportError, match="Forward cannot be exported"):
        export(branch, "pt2", tmp_path / "new" / "m.pt2", example_inputs=torch.ones(3, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.formats import pt2 as module

    real = module.program_of

    def corrupt(subject: Any) -> Any:
        program = real(subject)
        name = next(iter(program.state_dict))
        program.state_dict[name] = nn.Parameter(program.state_dict[name] * 1.01)
        return program

    monkeypatch.setattr(module, "program_of", corrupt)
    p = operated("mlp")
    for mode in ("merged", "live"):
        with pytest.raises(ExportError, match="differs from PyTorch"):
            export(p.model, "pt2", tmp_path / "m.pt2", mode=mode, example_inputs=p.inputs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["pt2", "torchscript"])
def test_where_nothing_can_be_written(format: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    p = operated("mlp")
    with pytest.raises(ExportError, match="cannot write"):
        export(p.model, format, tmp_path / "file" / "folder", example_inputs=p.inputs)
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("format", ["pt2", "torchscript"])
def test_a_full_disk_leaves_nothing(format: str, tmp_path: Path) -> None:
    code = f"""
import resource, signal, sys, torch
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from exporters import ExportError, export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    export(torch.nn.Linear(300, 300), {format!r}, "new/folder", example_inputs=torch.randn(2, 300))
except ExportError as error:
    assert "cannot write" in str(error), error
else:
    raise AssertionError("it was written")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["handled", "ignored"])
def handler(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What is done on an interrupt, whatever this process began with: under ``nohup``, nothing is."""
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_torchs_writer(handler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, write = operated("mlp"), _Sink.write

    def interrupted(self: _Sink, data: Any) -> int:
        signal.raise_signal(signal.SIGINT)
        return write(self, data)

    monkeypatch.setattr(_Sink, "write", interrupted)
    with contextlib.nullcontext() if handler is signal.SIG_IGN else pytest.raises(KeyboardInterrupt):
        export(found.model, "pt2", tmp_path / "model.pt2", example_inputs=found.inputs)
    assert signal.getsignal(signal.SIGINT) is handler
    if handler is signal.SIG_IGN:
        assert_close(first(load(tmp_path / "model.pt2"), found.inputs), found.run())
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ['say "x"', "class"])
def test_a_module_name_that_torch_cannot_write_as_code_is_named(name, tmp_path):
    model = apply_surgery(Named(name), "antipasto", r=2, progress=False)
    with pytest.raises(ExportError, match=r"a tensor named 'layers.*rename the module"):
        export(model, "pt2", tmp_path / "model.pt2", mode="live", example_inputs=torch.randn(3, 4))
    assert list(tmp_path.iterdir()) == []


def test_another_unusual_module_name_is_exported(tmp_path):
    model = apply_surgery(Named("it's x\\y [0]"), "antipasto", r=2, progress=False)
    report = export(model, "pt2", tmp_path / "model.pt2", mode="live", example_inputs=torch.randn(3, 4))
    assert report.max_error < 1e-5


class Named(nn.Module):
    """A linear module under a name of any kind."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers, self.name = nn.ModuleDict({name: nn.Linear(4, 4)}), name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[self.name](x)
