"""AOTInductor packages: agree with PyTorch in a process with torch alone, and take another core without a rebuild.

A compilation takes half a minute, so that one package, of one layer, serves all quick tests.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters import ExportError, ExportReport, export, swap
from exporters.formats import aoti as module
from surgery import AdapterError, apply_surgery, save_adapter, sites, steer, to_graph
from surgery.variants import REGISTRY
from tests.support.fresh import run_fresh
from tests.support.onnx_models import operated
from tests.support.program_models import first, shaken, with_variant
from tests.support.tolerance import RELATIVE, assert_close, relative_error
from tests.support.zoo import SmallModel, small_model


def load(path: Path) -> Any:
    return torch._inductor.aoti_load_package(str(path))


@dataclass
class Live:
    operated: SmallModel
    report: ExportReport
    before: dict[str, tuple[int, torch.Tensor]]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Live:
    p = operated("qwen3", layers=1)
    before = {name: (id(t), t.clone()) for name, t in p.model.state_dict(keep_vars=True).items()}
    path = tmp_path_factory.mktemp("live") / "folder"
    return Live(p, export(p.model, "aoti", path, mode="live", example_inputs=p.inputs), before)


@pytest.mark.long
def test_agrees_and_steers(live: Live) -> None:
    assert live.report.files == (live.report.path,)
    assert live.report.path.name == "model.pt2"
    assert live.report.max_error < RELATIVE[torch.float32]
    program = load(live.report.path)
    assert_close(first(program, live.operated.inputs), live.operated.run())
    for coeff in (0.0, -0.5, 1.5):
        program.load_constants({"coeff": torch.tensor(coeff)}, check_full_update=False)
        with steer(live.operated.model, coeff):
            assert_close(first(program, live.operated.inputs), live.operated.run())


def test_sizes_are_free(live: Live) -> None:
    assert live.report.details["sizes"] == {"batch": "free", "sequence": "free"}
    ids = torch.randint(0, 64, (5, 11))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_close(first(load(live.report.path), inputs), live.operated.run(inputs=inputs))


def test_another_core_from_a_model_or_a_directory(live: Live, tmp_path: Path) -> None:
    program, other = load(live.report.path), shaken(operated("qwen3", layers=1))
    expected = other.run()
    assert relative_error(expected, live.operated.run()) > 100 * RELATIVE[torch.float32]
    swap(program, other.model)
    assert_close(first(program, live.operated.inputs), expected)
    swap(program, live.operated.model)
    assert_close(first(program, live.operated.inputs), live.operated.run())
    save_adapter(other.model, tmp_path / "adapter")
    swap(program, tmp_path / "adapter", coeff=-0.5)
    with steer(other.model, -0.5):
        assert_close(first(program, live.operated.inputs), other.run())


def test_an_adapter_of_another_model_is_refused_and_changes_nothing(live: Live) -> None:
    program, p = load(live.report.path), live.operated
    for other, r, message in (
        (small_model("qwen3", seed=1, layers=1), 6, "another base weight"),
        (small_model("qwen3", layers=1), 5, "r is 5"),
    ):
        apply_surgery(other.model, "antipasto", r=r, example_inputs=p.inputs, progress=False)
        with pytest.raises(AdapterError, match=message):
            swap(program, other.model, coeff=0.0)
    assert_close(first(program, p.inputs), p.run())


def test_loads_with_torch_alone_and_takes_a_core_there(live: Live, tmp_path: Path) -> None:
    p, other = live.operated, shaken(operated("qwen3", layers=1))
    save_adapter(other.model, tmp_path / "adapter")
    save_file(p.inputs, tmp_path / "inputs.safetensors")
    (tmp_path / "m.pt2").symlink_to(live.report.path)
    run_fresh(
        """
inputs = load_file("inputs.safetensors")
program = torch._inductor.aoti_load_package("m.pt2")
found = {"one": program(**inputs)["logits"]}
program.load_constants({"coeff": torch.tensor(-0.5)}, check_full_update=False)
found["steered"] = program(**inputs)["logits"]
adapter = load_file("adapter/adapter_model.safetensors")
core = {name: value for name, value in adapter.items() if ".core." in name}
program.load_constants({"coeff": torch.tensor(1.0), **core}, check_full_update=False)
found["other"] = program(**inputs)["logits"]
save_file(found, "found.safetensors")
""",
        tmp_path,
    )
    found = load_file(tmp_path / "found.safetensors")
    assert_close(found["one"], p.run())
    assert_close(found["other"], other.run())
    with steer(p.model, -0.5):
        assert_close(found["steered"], p.run())


def test_constants_have_the_models_names_and_nothing_names_this_machine(live: Live) -> None:
    names = load(live.report.path).get_constant_fqns()
    assert {"coeff", *(f"{key}.core.g" for key in sites(live.operated.model))} <= set(names)
    assert len(set(names)) == len(names)
    assert ("lm_head.weight" in names) != ("model.embed_tokens.weight" in names)  # tied: there once
    with zipfile.ZipFile(live.report.path) as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist())
    for folder in (Path(torch.__file__).parent.parent, Path(__file__).parents[2], Path.home() / ".cache"):
        assert str(folder).encode() not in everything
    held = json.loads(load(live.report.path).get_metadata()["sspace-program"])
    assert held["knob"] == "coeff"
    assert set(held["sites"]) == set(sites(live.operated.model))


def test_the_model_is_left_as_it_was(live: Live) -> None:
    after = live.operated.model.state_dict(keep_vars=True)
    assert after.keys() == live.before.keys()
    assert all(id(after[n]) == found[0] and torch.equal(after[n], found[1]) for n, found in live.before.items())
    assert "forward" not in vars(live.operated.model)


def test_without_a_compiler(tmp_path: Path) -> None:
    p = operated("mlp")
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ExportError, match=r"needs a C\+\+ compiler"),
    ):
        export(p.model, "aoti", tmp_path / "new" / "m.pt2", example_inputs=p.inputs)
    assert list(tmp_path.iterdir()) == []


def test_failures_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = operated("mlp")
    with pytest.raises(ExportError, match="carries none"):
        export(small_model("mlp").model, "aoti", tmp_path / "m.pt2", mode="live", example_inputs=p.inputs)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no lowering for this operation")

    monkeypatch.setattr(torch._inductor, "aot_compile", fail)
    with pytest.raises(ExportError, match="Sequential cannot be compiled: RuntimeError: no lowering"):
        export(p.model, "aoti", tmp_path / "new" / "m.pt2", example_inputs=p.inputs)
    assert list(tmp_path.iterdir()) == []
    assert module.SLOW


@pytest.mark.full
@pytest.mark.parametrize("name", ["mlp", "attention", "encoder_layer", "gpt2", "bert", "vit", "t5"])
def test_merged(name: str, tmp_path: Path) -> None:
    p = operated(name)
    report = export(p.model, "aoti", tmp_path / "m.pt2", example_inputs=p.inputs)
    program = load(report.path)
    assert_close(first(program, p.inputs), p.run())
    with zipfile.ZipFile(report.path) as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert not [word for word in (b"sspace", b".core", b"factors", b"coeff") if word in everything]
    with pytest.raises(ExportError, match="holds no adapter"):
        swap(program, coeff=0.0)


@pytest.mark.full
@pytest.mark.parametrize("variant", sorted(REGISTRY))
def test_every_variant_lives_and_takes_another_core(variant: str, tmp_path: Path) -> None:
    p = with_variant(variant)
    program = load(export(p.model, "aoti", tmp_path / "m.pt2", mode="live", example_inputs=p.inputs).path)
    shaken(p, seed=3)
    swap(program, p.model, coeff=0.5)
    with steer(p.model, 0.5):
        assert_close(first(program, p.inputs), p.run())


@pytest.mark.full
def test_a_core_at_identity_can_be_replaced(tmp_path: Path) -> None:
    """Inductor takes a tensor of zeros for a constant, and with it all that is computed from it."""
    p = small_model("mlp")
    apply_surgery(p.model, "antipasto", r=6, example_inputs=p.inputs, progress=False)
    program = load(export(p.model, "aoti", tmp_path / "m.pt2", mode="live", example_inputs=p.inputs).path)
    swap(program, shaken(p).model, coeff=0.5)
    with steer(p.model, 0.5):
        assert_close(first(program, p.inputs), p.run())


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    p = operated("mlp", dtype)
    program = load(export(p.model, "aoti", tmp_path / "m.pt2", mode="live", example_inputs=p.inputs).path)
    swap(program, coeff=0.5)
    with steer(p.model, 0.5):
        assert_close(first(program, p.inputs), p.run(), dtype)


@pytest.mark.full
@pytest.mark.parametrize("name", ["mlp", "raw"])
def test_graph_modules(name: str, tmp_path: Path) -> None:
    p = operated(name)
    graph = to_graph(p.model, p.inputs, fuse=True)
    program = load(export(graph, "aoti", tmp_path / "m.pt2", mode="live", example_inputs=p.inputs).path)
    other = shaken(operated(name))
    swap(program, other.model, coeff=-0.5)
    with steer(other.model, -0.5):
        assert_close(first(program, p.inputs), other.run())
