"""Dense export: correctly rounded weights, folders that plain transformers loads, state dicts, ties, faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import fx, nn

from exporters import ExportError, export
from exporters.formats import dense as module
from surgery import (
    Contrast,
    InputError,
    VariantError,
    WeightError,
    apply_surgery,
    merge,
    set_coeff,
    sites,
    to_graph,
)
from surgery.hosting.state import module_paths, parameter_names
from surgery.variants import REGISTRY
from tests.support.calibration_data import calibration_for
from tests.support.checkpoints import build, disturb
from tests.support.dense_models import operated
from tests.support.reference import reference_delta_weight
from tests.support.tolerance import ELSEWHERE, assert_close
from tests.support.zoo import HUB_NAMES, PLAIN_NAMES, small_model

LINEAR = sorted(name for name, cls in REGISTRY.items() if cls().linear)


def rounded(exact: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Float64 values correctly rounded to a dtype, ties to even, and the unit in the last place of each."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]
    lowest = {torch.bfloat16: -125, torch.float16: -13, torch.float32: -125}[dtype]
    unit = np.ldexp(1.0, np.maximum(np.frexp(exact)[1], lowest) - bits)
    return np.rint(exact / unit) * unit, unit


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("variant", LINEAR)
def test_weights_are_the_rounded_sum(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 128)).to(dtype)
    x = torch.randn(64, 256).to(dtype)
    data = calibration_for(variant, x)
    apply_surgery(model, variant, r=32, target_modules="all-linear", calibration=data, example_inputs=x, progress=False)
    disturb(model)
    set_coeff(model, 0.7)
    export(model, "dense", tmp_path / "out", example_inputs=x)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    coeff = float(next(iter(sites(model).values())).steering.coeff)
    right = total = 0
    for key, site in sites(model).items():
        exact = (site.weight.double() + reference_delta_weight(site, coeff)).detach().numpy()
        expected, unit = rounded(exact, dtype)
        found = stored[f"{key}.weight"].double().numpy()
        assert (np.abs(found - exact) <= unit).all()
        right, total = right + (found == expected).sum(), total + found.size
        assert not torch.equal(stored[f"{key}.weight"], site.weight)
    assert right >= 0.999 * total, right / total


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20))
def test_the_reference_rounds_as_torch_does(values: list[float]) -> None:
    exact = torch.tensor(values, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert (rounded(exact.double().numpy(), dtype)[0] == exact.to(dtype).double().numpy()).all()


OFFLINE = """
import json, sys
import torch, transformers
folder, inputs, out = sys.argv[1:]
(name,) = json.load(open(f"{folder}/config.json"))["architectures"]
model = getattr(transformers, name).from_pretrained(folder)
with torch.no_grad():
    torch.save(model(**torch.load(inputs, weights_only=True))[0], out)
assert not {"surgery", "passes", "exporters"} & sys.modules.keys()
"""


def test_plain_transformers_loads_it_without_this_package(tmp_path: Path) -> None:
    p = operated("qwen3", torch.bfloat16)
    report = export(p.model, "dense", tmp_path / "out")
    torch.save(p.inputs, tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OFFLINE, str(report.path), str(tmp_path / "inputs.pt"), str(tmp_path / "y.pt")]
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=tmp_path)
    found = torch.load(tmp_path / "y.pt", weights_only=True)
    assert found.dtype == torch.bfloat16
    assert_close(found, merge(p.model) and p.run())


@pytest.mark.matrix
@pytest.mark.parametrize("name", HUB_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hub_models(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    p = operated(name, dtype)
    report = export(p.model, "dense", tmp_path / "out", example_inputs=p.inputs, max_shard_size="20KB")
    assert report.path == tmp_path / "out"
    assert len(sites(p.model)) == report.details["sites"]
    assert report.details["compared"] == "weights and outputs"
    assert report.max_error < ELSEWHERE[dtype]
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded = type(p.model).from_pretrained(tmp_path / "out").to(dtype)
    merge(p.model)
    assert torch.equal(p.run(loaded), p.run())


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral", "olmoe", "qwen3_moe"])
def test_models_that_save_other_names(name: str, tmp_path: Path) -> None:
    model = build(name)
    apply_surgery(model, "antipasto", r=4, progress=False)
    disturb(model)
    report = export(model, "dense", tmp_path / "out")
    assert report.max_error < 1e-5
    assert any(".experts." in key for key in sites(model)) == (name != "gpt_neox")


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_plain_modules(name: str, tmp_path: Path) -> None:
    p = operated(name)
    report = export(p.model, "dense", tmp_path / "out", example_inputs=p.inputs)
    assert [file.name for file in report.files] == ["model.safetensors"]
    other = small_model(name, seed=1).model
    other.load_state_dict(load_file(report.files[0]))
    assert_close(p.run(other), p.run())
    assert report.max_error < 1e-5


@pytest.mark.parametrize("name", ["mlp", "raw", "qwen3"])
def test_graph_modules(name: str, tmp_path: Path) -> None:
    p = operated(name)
    graph = to_graph(p.model, p.inputs)
    report = export(graph, "dense", tmp_path / "out", example_inputs=p.inputs)
    assert report.max_error < 1e-5
    plain = to_graph(operated(name).model, p.inputs)
    merge(plain)
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert_close(p.run(plain), p.run())
    assert sites(graph).keys() == sites(p.model).keys()


class Tied(nn.Module):
    """Two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.second(torch.relu(self.first(x)))))


@pytest.mark.parametrize("traced", [False, True])
def test_tied_weights_of_plain_modules(traced: bool, tmp_path: Path) -> None:
    x = torch.randn(5, 8)
    model: Any = fx.symbolic_trace(Tied()) if traced else Tied()
    apply_surgery(model, "antipasto", r=4, target_modules=["first", "out"], example_inputs=x, progress=False)
    disturb(model)
    with pytest.raises(WeightError, match="untie=True"):
        export(model, "dense", tmp_path / "out", example_inputs=x)
    assert list(tmp_path.iterdir()) == []
    export(model, "dense", tmp_path / "out", example_inputs=x, untie=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["second.weight"], model.second.weight)
    assert_close(merge(model, untie=True)(x), model(x))


def test_tensors_that_stay_shared_are_all_in_the_file(tmp_path: Path) -> None:
    model, x = Tied(), torch.randn(5, 8)
    apply_surgery(model, "antipasto", r=4, target_modules=["out"], example_inputs=x, progress=False)
    disturb(model)
    export(model, "dense", tmp_path / "out", example_inputs=x)
    other = Tied()
    other.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert_close(other(x), model(x))


def test_a_tied_head_is_refused_or_untied(tmp_path: Path) -> None:
    p = operated("qwen3", target_modules=["lm_head", "up_proj"])
    with pytest.raises(WeightError, match=r"'lm_head' shares its weight .*untie=True"):
        export(p.model, "dense", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    export(p.model, "dense", tmp_path / "out", untie=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert p.model.config.tie_word_embeddings is True
    loaded = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.model.embed_tokens.weight, p.model.model.embed_tokens.weight)
    assert_close(p.run(loaded), p.run())


def test_a_model_that_was_not_operated_on(tmp_path: Path) -> None:
    p = small_model("llama")
    assert export(p.model, "dense", tmp_path / "hub").max_error == 0
    export(small_model("mlp").model, "dense", tmp_path / "plain")
    assert torch.equal(
        load_file(tmp_path / "hub" / "model.safetensors")["lm_head.weight"], p.model.lm_head.weight.detach()
    )
    assert (tmp_path / "hub" / "generation_config.json").exists()


def test_the_present_coeff_is_merged_and_the_model_stays(tmp_path: Path) -> None:
    p = operated("llama")
    set_coeff(p.model, -0.5)
    p.model.train()
    tensors = {name: (id(t), t.clone()) for name, t in p.model.state_dict(keep_vars=True).items()}
    modules = [(name, id(m), type(m), m.training) for name, m in p.model.named_modules()]
    flags = [(name, q.requires_grad) for name, q in p.model.named_parameters()]
    config = p.model.config.to_dict()
    export(p.model, "dense", tmp_path / "out")
    assert modules == [(name, id(m), type(m), m.training) for name, m in p.model.named_modules()]
    assert flags == [(name, q.requires_grad) for name, q in p.model.named_parameters()]
    assert config == p.model.config.to_dict()
    for name, tensor in p.model.state_dict(keep_vars=True).items():
        assert id(tensor) == tensors[name][0]
        assert torch.equal(tensor, tensors[name][1])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for site in sites(p.model).values():
        exact = site.weight.double() + reference_delta_weight(site, -0.5)
        assert_close(stored[parameter_names(module_paths(p.model), site)[0]], exact.float(), rounded=True)


def test_tokenizer_files_go_along(tmp_path: Path) -> None:
    base = tmp_path / "base"
    small_model("llama").model.save_pretrained(base)
    for name in ("tokenizer.json", "special_tokens_map.json", "LICENSE", "optimizer.bin"):
        (base / name).write_text("{}")
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    apply_surgery(model, "antipasto", r=4, progress=False)
    export(model, "dense", tmp_path / "out")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "special_tokens_map.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*names, "LICENSE"}

    class Tokenizer:
        def save_pretrained(self, path: Path) -> None:
            (Path(path) / "tokenizer.json").write_text("mine")

    export(model, "dense", tmp_path / "given", tokenizer=Tokenizer())
    assert (tmp_path / "given" / "tokenizer.json").read_text() == "mine"
    assert not (tmp_path / "given" / "LICENSE").exists()


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    p = operated("mlp")
    with pytest.raises(InputError, match="does not run"):
        export(p.model, "dense", tmp_path / "out", example_inputs=torch.randn(2, 99))
    with pytest.raises(ExportError, match="max_shard_size is for transformers"):
        export(p.model, "dense", tmp_path / "out", max_shard_size="1GB")
    q = small_model("llama")
    contrast = Contrast([q.inputs], [{**q.inputs, "input_ids": q.inputs["input_ids"].flip(1)}])
    apply_surgery(q.model, "sspace", r=4, calibration=contrast, progress=False)
    with pytest.raises(VariantError, match="sspace is not linear"):
        export(q.model, "dense", tmp_path / "out")
    set_coeff(p.model, torch.ones(5))
    with pytest.raises(InputError, match="rows of a batch"):
        export(p.model, "dense", tmp_path / "out", example_inputs=p.inputs)
    with torch.device("meta"):
        on_meta = nn.Linear(3, 3)
    with pytest.raises(ExportError, match="meta device"):
        export(on_meta, "dense", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_wrong_weights_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p, real = operated(name), module.merge

    def corrupt(model: nn.Module, **options: Any) -> nn.Module:
        merged = real(model, **options)
        merged.get_parameter(min(names)).data.view(-1)[0] += 1e-3
        return merged

    names = {parameter_names(module_paths(p.model), site)[0] for site in sites(p.model).values()}
    monkeypatch.setattr(module, "merge", corrupt)
    with pytest.raises(ExportError, match="merged weight is off"):
        export(p.model, "dense", tmp_path / "out", example_inputs=p.inputs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_a_file_that_lost_a_bit_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p, loader = operated(name), "load_pretrained" if name == "llama" else "load_state"
    real = getattr(module, loader)

    def corrupt(model: nn.Module, path: Path) -> nn.Module:
        data = bytearray((path / "model.safetensors").read_bytes())
        data[-2] ^= 1
        (path / "model.safetensors").write_bytes(data)
        return real(model, path)

    monkeypatch.setattr(module, loader, corrupt)
    with pytest.raises(ExportError, match="is not what was saved"):
        export(p.model, "dense", tmp_path / "out", example_inputs=p.inputs)
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, sys
import torch
from exporters import export
from tests.support.dense_models import operated
from tests.support.calibration_data import calibration_for
p = operated(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
export(p.model, "dense", sys.argv[2], example_inputs=p.inputs)
"""


@pytest.mark.parametrize("name", [pytest.param("mlp", marks=pytest.mark.full), "llama"])
def test_a_full_disk_leaves_nothing(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, name, str(tmp_path / "new" / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "ExportError: " in done.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
