"""LoRA export: what the real PEFT loads against the model, ranks, pruning, and where PEFT has no place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

import surgery
from exporters import export
from surgery import (
    apply_surgery,
    set_coeff,
    sites,
)
from surgery.variants import REGISTRY
from tests.support.peft_models import assert_same_in_peft, exact_change, loaded, operate, operated, ranks
from tests.support.zoo import SmallModel, small_model

LINEAR = [name for name, variant in REGISTRY.items() if variant.linear]
NAMES = ("mlp", "qwen3", "llama", "gpt2", "bert", "vit", "t5")


@pytest.mark.parametrize("name", NAMES)
def test_peft_gives_the_models_outputs_and_merged_weights(name: str, tmp_path: Path) -> None:
    p = operated(name)
    set_coeff(p.model, -0.8)
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert report.path == tmp_path / "a"
    assert sorted(f.name for f in report.files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert report.max_error < 1e-5
    assert report.details["frobenius_error"] < 1e-6
    assert ranks(report.path) == {key: site.factors.rank for key, site in sites(p.model).items()}
    assert_same_in_peft(p, lambda: small_model(name).model, report.path)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["mlp", "qwen3"])
@pytest.mark.parametrize("variant", LINEAR)
def test_every_linear_variant(name: str, variant: str, tmp_path: Path) -> None:
    p = operated(name, variant)
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    for key, site in sites(p.model).items():
        full = torch.linalg.matrix_rank(site.delta_weight(torch.float64))
        assert report.details["sites"][key]["rank"] == full
    assert_same_in_peft(p, lambda: small_model(name).model, report.path)


def test_full_rank_keeps_the_stored_factors(tmp_path: Path) -> None:
    p = operated("mlp", "lora_xs")
    export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for key, site in sites(p.model).items():
        assert torch.equal(tensors[f"base_model.model.{key}.lora_A.weight"], site.factors.Vh)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (6, 6, {}, {})
    assert (config["peft_type"], config["bias"], config["target_modules"]) == ("LORA", "none", ["0", "2", "4"])


@pytest.mark.parametrize("k", [1, 2])
def test_ablation_has_the_rank_of_its_directions(k: int, tmp_path: Path) -> None:
    p = operated("qwen3", surgery.AntiPaSTOAblate(r=8, k=k))
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert set(ranks(report.path).values()) == {k}
    assert report.details["frobenius_error"] < 1e-6
    assert_same_in_peft(p, lambda: small_model("qwen3").model, report.path)


def test_ranks_that_differ_have_a_scaling_of_one(tmp_path: Path) -> None:
    p = operated("qwen3", "lora_xs", rank_pattern={"q_proj": 3, "0.mlp.down_proj": 2})
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    found = ranks(report.path)
    assert found == {key: site.factors.rank for key, site in sites(p.model).items()}
    assert set(found.values()) == {2, 3, 6}
    model = PeftModel.from_pretrained(small_model("qwen3").model, report.path)
    assert {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)} == {1.0}
    assert_same_in_peft(p, lambda: small_model("qwen3").model, report.path)


class Named(nn.Module):
    """Modules whose names end each other's, or are expressions for each other's."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"a": nn.Linear(8, 8), "a_b": nn.Linear(8, 8), "axb": nn.Linear(8, 8)})
        self.deep = nn.ModuleDict({"inner": nn.ModuleDict({"a": nn.Linear(8, 8)})})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modules = (self.a, *self.inner.values(), self.deep["inner"]["a"])
        for module in modules:
            x = torch.tanh(module(x))
        return x


@pytest.mark.parametrize(
    ("target", "pattern"),
    [
        ("a", {}),
        ("a|inner.a", {}),
        (".*", {"a": 2, "inner.a": 3, "deep.inner.a": 4, "inner.a_b": 5}),
        ("inner.a_b", {}),
    ],
)
def test_names_that_end_other_names(target: str, pattern: dict[str, int], tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Named().eval()

    pattern = {f"^{name}": rank for name, rank in pattern.items()}
    p = operate(SmallModel("named", build(), torch.randn(3, 8)), "lora_xs", target_modules=target, rank_pattern=pattern)
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert ranks(report.path) == {key: site.factors.rank for key, site in sites(p.model).items()}
    assert_same_in_peft(p, build, report.path)


def test_a_core_at_identity_stays_in_the_adapter(tmp_path: Path) -> None:
    p = small_model("qwen3")
    apply_surgery(p.model, "antipasto", r=6, progress=False)
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert ranks(report.path) == dict.fromkeys(sites(p.model), 1)
    assert report.max_error == 0
    assert torch.equal(loaded(p, small_model("qwen3").model, report.path), p.run())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_models_of_other_dtypes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    p = operated(name, dtype=dtype)
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in load_file(report.path / "adapter_model.safetensors").values()} == {wide}
    assert_same_in_peft(p, lambda: small_model(name, dtype).model, report.path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_on_request_is_reported(dtype: torch.dtype, tmp_path: Path) -> None:
    p = operated("qwen3")
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs, dtype=dtype)
    tensors = load_file(report.path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {dtype}
    for key, site in sites(p.model).items():
        A, B = (tensors[f"base_model.model.{key}.lora_{x}.weight"].double() for x in "AB")
        change = exact_change(site)
        true = float((B @ A - change).norm() / change.norm())
        assert report.details["sites"][key]["frobenius_error"] == pytest.approx(true, rel=1e-6)
    assert 1e-5 < report.details["frobenius_error"] < torch.finfo(dtype).eps


def test_two_exports_are_byte_identical(tmp_path: Path) -> None:
    p = operated("qwen3", rank_pattern={"q_proj": 3})
    first, second = (export(p.model, "lora", tmp_path / x, example_inputs=p.inputs) for x in "ab")
    for one, other in zip(first.files, second.files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_random_numbers_are_not_drawn(tmp_path: Path) -> None:
    p = operated("qwen3")
    before = torch.get_rng_state()
    export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "task"),
    [("qwen3", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert", None), ("mlp", None)],
)
def test_the_configuration_tells_what_the_base_is(name: str, task: str | None, tmp_path: Path) -> None:
    p = operated(name)
    if name == "qwen3":
        p.model.config._name_or_path = "someone/some-model"
    if name == "gpt2":
        p.model.config._name_or_path = str(tmp_path)
    export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["task_type"] == task
    assert config["base_model_name_or_path"] == ("someone/some-model" if name == "qwen3" else None)
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert (config["auto_mapping"] is not None) == (name == "bert")
