"""Swappable ONNX: trained cores over one file, each against PyTorch; cores that do not belong are refused."""

from __future__ import annotations

import copy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import surgery
from exporters import ExportError, check_core, export, export_core
from surgery import apply_surgery, sites, steer, to_graph
from surgery.bases.top_svd import SVD
from surgery.cores import CoreConfig
from surgery.variants import REGISTRY, Variant
from surgery.verbs.calibrate import recalibrate
from tests.support.onnx_models import operated, session
from tests.support.shared_exports import SharedExports
from tests.support.swappable_models import train, with_variant
from tests.support.tolerance import assert_close
from tests.support.zoo import VARIED, SmallModel, full, in_the_gate, small_model


def run(path: Path, p: SmallModel, core: Path | None = None, **coefficient: np.ndarray) -> torch.Tensor:
    """First output in ONNX Runtime, with a core."""
    running = session(path)
    required = [value.name for value in running.get_inputs()]
    inputs = p.inputs
    if not isinstance(inputs, dict):
        inputs = dict(zip(required, inputs if isinstance(inputs, tuple) else (inputs,), strict=True))
    feed = {name: value.numpy() for name, value in inputs.items() if name in required}
    options, adapter = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    if core is not None:
        adapter.Load(str(core))
        options.add_active_adapter(adapter)
    return torch.from_numpy(running.run(None, {**feed, **coefficient}, options)[0])


@pytest.mark.parametrize("name", ["mlp", "raw", "attention", "qwen3", "gpt2", *full("bert", "t5")])
def test_cores_are_swapped_over_one_file(name: str, tmp_path: Path, exported: SharedExports) -> None:
    p, report = exported(operated, name, "swappable")
    assert 0 <= report.max_error < 1e-5
    assert_close(run(report.path, p), p.run())
    first = p.run()
    for seed in (2, 3):
        train(p.model, seed)
        core = export_core(p.model, tmp_path / f"{seed}.onnx_adapter", onnx_path=report.path)
        assert core.max_error == 0
        assert core.path.stat().st_size < 16_000
        assert_close(run(report.path, p, core.path), p.run())
        with steer(p.model, -0.5):
            assert_close(run(report.path, p, core.path, coeff=np.array(-0.5, np.float32)), p.run())
    assert (first - p.run()).abs().max() > 1e-3  # or it would not matter which core is active
    assert_close(run(report.path, p), first)


@pytest.mark.parametrize("variant", in_the_gate(sorted(REGISTRY), *VARIED))
def test_every_variant_is_live_and_swappable(variant: str, tmp_path: Path) -> None:
    p = with_variant(variant)
    live = export(p.model, "onnx", tmp_path / "live.onnx", mode="live", example_inputs=p.inputs)
    both = export(p.model, "onnx", tmp_path / "both.onnx", mode="swappable", example_inputs=p.inputs)
    train(p.model, 2)
    core = export_core(p.model, tmp_path / "core.onnx_adapter", onnx_path=both.path).path
    rows = torch.linspace(-1, 1, 5)
    with steer(p.model, rows):
        assert_close(run(both.path, p, core, coeff=rows.numpy()), p.run())
    assert_close(run(both.path, p, core), p.run())
    assert max(live.max_error, both.max_error) < 1e-5
    if REGISTRY[variant].linear:
        assert export(p.model, "onnx", tmp_path / "m.onnx", example_inputs=p.inputs).max_error < 1e-5
    else:
        with pytest.raises(surgery.VariantError, match="not linear"):
            export(p.model, "onnx", tmp_path / "m.onnx", example_inputs=p.inputs)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(surgery.AntiPaSTO(suppress_only=True), marks=pytest.mark.full),
        surgery.AntiPaSTORot(rotate_basis="both", block_size=2),
        pytest.param(surgery.AntiPaSTOAblate(k=3, allow_amplify=True), marks=pytest.mark.full),
    ],
    ids=lambda v: v.name,
)
def test_settings_of_variants(variant: Variant, tmp_path: Path) -> None:
    p = with_variant(variant)
    assert export(p.model, "onnx", tmp_path / "m.onnx", mode="swappable", example_inputs=p.inputs).max_error < 1e-5


def test_no_core_tensor_is_a_constant(tmp_path: Path) -> None:
    p = with_variant("antipasto_dplr")
    path = export(p.model, "onnx", tmp_path / "m.onnx", mode="swappable", example_inputs=p.inputs).path
    running = session(path)
    free = {value.name: value for value in running.get_overridable_initializers()}
    expected = {f"{k}.core.{n}": tuple(t.shape) for k, s in sites(p.model).items() for n, t in s.core.tensors().items()}
    assert {name.partition("@")[0]: tuple(v.shape) for name, v in free.items() if name != "coeff"} == expected
    assert len({name.partition("@")[2] for name in free if name != "coeff"}) == 1
    assert [value.name for value in running.get_inputs()] == ["input"]


def test_half_models_keep_cores_in_float32(tmp_path: Path) -> None:
    p = operated("qwen3", torch.float16, layers=1)
    path = export(p.model, "onnx", tmp_path / "m.onnx", mode="swappable", example_inputs=p.inputs).path
    assert {value.type for value in session(path).get_overridable_initializers()} == {"tensor(float)"}
    train(p.model, 2)
    core = export_core(p.model, tmp_path / "c.onnx_adapter", onnx_path=path).path
    assert_close(run(path, p, core), p.run(), torch.float16)


def test_graph_modules_swap_the_cores_of_their_models(tmp_path: Path) -> None:
    p = operated("mlp")
    graph = to_graph(p.model, p.inputs)
    path = export(graph, "onnx", tmp_path / "m.onnx", mode="swappable", example_inputs=p.inputs).path
    train(p.model, 2)
    core = export_core(p.model, tmp_path / "c.onnx_adapter", onnx_path=path).path
    assert_close(run(path, p, core), p.run())


@pytest.mark.full
def test_experts(tmp_path: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    config = t.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    ids = torch.randint(0, 64, (2, 7))
    p = SmallModel("mixtral", t.MixtralForCausalLM(config).eval(), {"input_ids": ids})
    apply_surgery(p.model, "antipasto", r=4, progress=False)
    train(p.model, 1)
    for mode in ("merged", "swappable"):
        path = export(p.model, "onnx", tmp_path / f"{mode}.onnx", mode=mode, example_inputs=p.inputs).path
        assert_close(run(path, p), p.run())
    train(p.model, 2)
    core = export_core(p.model, tmp_path / "c.onnx_adapter", onnx_path=path).path
    assert_close(run(path, p, core), p.run())


@pytest.mark.full
def test_two_exports_are_byte_identical(tmp_path: Path, exported: SharedExports) -> None:
    p, first = exported(operated, "qwen3", "swappable")
    again = export(p.model, "onnx", tmp_path / "m.onnx", mode="swappable", example_inputs=p.inputs)
    graphs, cores = [report.path.read_bytes() for report in (first, again)], []
    for i in range(2):
        cores.append(export_core(copy.deepcopy(p.model), tmp_path / f"{i}.onnx_adapter").path.read_bytes())
    assert graphs[0] == graphs[1]
    assert cores[0] == cores[1]
    assert b"site-packages" not in graphs[0]
    assert str(Path(__file__).parents[2]).encode() not in graphs[0]


def another(p: SmallModel, **changes: Any) -> nn.Module:
    """The model operated on in another way, or another model."""
    q = small_model(p.name, seed=changes.pop("seed", 0))
    apply_surgery(q.model, **{"variant": "antipasto", "r": 6, "example_inputs": q.inputs, "progress": False, **changes})
    train(q.model, 1)
    return q.model


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 5}, "another base, other factors"),
        ({"variant": surgery.AntiPaSTO(suppress_only=True)}, "other settings"),
        ({"r": 5}, "another base, other factors"),
        ({"variant": "lora_xs"}, "other sites or another variant"),
        ({"target_modules": ["0"]}, "other sites"),
    ],
    ids=["base", "settings", "rank", "variant", "sites"],
)
def test_a_wrong_core_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path, exported: SharedExports) -> None:
    p, report = exported(operated, "mlp", "swappable")
    path = Path(shutil.copy(report.path, tmp_path))
    model = another(p, **changes)
    core = export_core(model, tmp_path / "c.onnx_adapter").path
    with pytest.raises(Exception, match=r"Invalid input name: .*\.core\."):  # a type of ONNX Runtime's
        run(path, p, core)
    with pytest.raises(ExportError, match=reason):
        check_core(path, core)
    with pytest.raises(ExportError, match=reason):
        export_core(model, tmp_path / "new" / "d.onnx_adapter", onnx_path=path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["c.onnx_adapter", "m.onnx"]


def test_factors_chosen_anew_make_another_digest(tmp_path: Path) -> None:
    p = with_variant("antipasto")
    path = export(p.model, "onnx", tmp_path / "m.onnx", mode="swappable", example_inputs=p.inputs).path
    recalibrate(p.model, [torch.randn(9, 12) * torch.linspace(0.01, 3, 12)], reset=True, progress=False)
    with pytest.raises(ExportError, match="other factors"):
        export_core(p.model, tmp_path / "c.onnx_adapter", onnx_path=path)


def test_files_that_are_no_cores(tmp_path: Path, exported: SharedExports) -> None:
    p, report = exported(operated, "mlp", "live")
    live = report.path
    core = export_core(p.model, tmp_path / "c.onnx_adapter").path
    with pytest.raises(ExportError, match="takes no core"):
        check_core(live, core)
    swappable = exported(operated, "mlp", "swappable")[1].path
    for data in (b"", b"nonsense" * 9, core.read_bytes()[:200]):
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(ExportError, match=r"no \.onnx_adapter"):
            check_core(swappable, tmp_path / "bad")
    with pytest.raises(ExportError, match="no ONNX model"):
        check_core(core, core)
    with pytest.raises(ExportError, match=r"no \.onnx_adapter"):
        check_core(swappable, tmp_path / "missing")


@pytest.mark.parametrize("location", ["/etc/passwd", "../other.data", "a/../../b", "..\\b", "C:\\b"])
def test_graphs_that_point_outside_of_their_folder_are_refused(
    location: str, tmp_path: Path, exported: SharedExports
) -> None:
    p, report = exported(operated, "mlp", "swappable")
    path = Path(shutil.copy(report.path, tmp_path))
    core = export_core(p.model, tmp_path / "c.onnx_adapter").path
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="outside of the folder"):
        check_core(path, core)


def test_export_core_refusals(tmp_path: Path) -> None:
    p = operated("mlp")
    with pytest.raises(ExportError, match="carries no adapter"):
        export_core(small_model("mlp").model, tmp_path / "c.onnx_adapter")
    next(iter(sites(p.model).values())).core.g.data[0] = float("nan")
    with pytest.raises(ExportError, match="not finite"):
        export_core(p.model, tmp_path / "c.onnx_adapter")
    assert list(tmp_path.iterdir()) == []


def test_export_core_into_a_directory_and_over_a_file(tmp_path: Path) -> None:
    p = operated("mlp")
    report = export_core(p.model, tmp_path / "new")
    assert report.path == tmp_path / "new" / "core.onnx_adapter"
    assert report.details["tensors"] == 3
    assert report.details["bytes"] == report.path.stat().st_size
    before = report.path.read_bytes()
    train(p.model, 2)
    assert export_core(p.model, report.path).path.read_bytes() != before


def test_a_core_tensor_without_dimensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in ("surgery.variants._variant.REGISTRY", "surgery.cores.REGISTRY"):
        module, _, name = registry.rpartition(".")
        monkeypatch.setattr(registry, dict(getattr(sys.modules[module], name)))

    @dataclass(frozen=True)
    class ScaleCore(CoreConfig):
        name: ClassVar[str] = "scale"

        def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
            return {"s": torch.zeros(())}

        def delta(self, h: torch.Tensor, S: torch.Tensor, core: Any, coeff: torch.Tensor) -> torch.Tensor:
            return h * (S * (coeff * core.s)).to(h.dtype)

    @dataclass(frozen=True)
    class Scale(Variant):
        name: ClassVar[str] = "scale"
        own_basis: ClassVar[type[SVD]] = SVD
        own_core: ClassVar[type[ScaleCore]] = ScaleCore

    p = with_variant(Scale())
    path = export(p.model, "onnx", tmp_path / "m.onnx", mode="swappable", example_inputs=p.inputs).path
    train(p.model, 2)
    assert_close(run(path, p, export_core(p.model, tmp_path / "c.onnx_adapter", onnx_path=path).path), p.run())
