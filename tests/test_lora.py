"""LoRA export: what the real PEFT loads against the model, ranks, pruning, and where PEFT has no place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

import surgery
from exporters import ExportError, export
from exporters._thin import low_rank
from surgery import (
    AdapterError,
    InputError,
    VariantError,
    apply_surgery,
    load_adapter,
    merge,
    set_coeff,
    sites,
    to_graph,
)
from surgery.variants import REGISTRY
from tests import test_stacked
from tests.tolerance import assert_close
from tests.zoo import Forward, Patient, patient

LINEAR = [name for name, variant in REGISTRY.items() if variant.linear]
NAMES = ("mlp", "qwen3", "llama", "gpt2", "bert", "vit", "t5")


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in sites(model).values():
            for name, parameter in site.core.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise.abs().clamp(0.1, 0.9) if name == "alpha" else noise * 0.3)
    return model


def operate(p: Patient, variant: Any = "antipasto", **options: Any) -> Patient:
    needs = surgery.variants.resolve_variant(variant, None).needs_calibration
    calibration = [p.inputs, p.inputs] if needs else None
    options = {"example_inputs": p.inputs, "calibration": calibration, "progress": False, **options}
    options = {"target_modules": "all-linear", **options}
    if isinstance(variant, str):
        options = {"r": 6, **options}
    trained(apply_surgery(p.model, variant, **options))
    return p


def operated(name: str, variant: Any = "antipasto", dtype: torch.dtype = torch.float32, **options: Any) -> Patient:
    return operate(patient(name, dtype), variant, **options)


def loaded(p: Patient, base: nn.Module, path: Path) -> torch.Tensor:
    """What PEFT's model gives, adapters beside the weights."""
    model = PeftModel.from_pretrained(base, path).eval()
    return p.run(model)


def ranks(path: Path) -> dict[str, int]:
    tensors = load_file(path / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


def assert_same_in_peft(p: Patient, base: Any, path: Path) -> None:
    """PEFT's outputs are the model's, and what it merges are the weights that ``merge`` gives."""
    dtype = next(p.model.parameters()).dtype
    assert_close(loaded(p, base(), path), p.run(), dtype)
    merged = PeftModel.from_pretrained(base(), path).eval().merge_and_unload().state_dict()
    expected = merge(p.model, untie=True).state_dict()
    assert merged.keys() == expected.keys()
    for name in expected:
        assert_close(merged[name], expected[name])


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
    assert_same_in_peft(p, lambda: patient(name).model, report.path)


@pytest.mark.parametrize("name", ["mlp", "qwen3"])
@pytest.mark.parametrize("variant", LINEAR)
def test_every_linear_variant(name: str, variant: str, tmp_path: Path) -> None:
    p = operated(name, variant)
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    for key, site in sites(p.model).items():
        full = torch.linalg.matrix_rank(site.delta_weight(torch.float64))
        assert report.details["sites"][key]["rank"] == full
    assert_same_in_peft(p, lambda: patient(name).model, report.path)


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
    assert_same_in_peft(p, lambda: patient("qwen3").model, report.path)


def test_ranks_that_differ_have_a_scaling_of_one(tmp_path: Path) -> None:
    p = operated("qwen3", "lora_xs", rank_pattern={"q_proj": 3, "0.mlp.down_proj": 2})
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    found = ranks(report.path)
    assert found == {key: site.factors.rank for key, site in sites(p.model).items()}
    assert set(found.values()) == {2, 3, 6}
    model = PeftModel.from_pretrained(patient("qwen3").model, report.path)
    assert {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)} == {1.0}
    assert_same_in_peft(p, lambda: patient("qwen3").model, report.path)


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
    p = operate(Patient("named", build(), torch.randn(3, 8)), "lora_xs", target_modules=target, rank_pattern=pattern)
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert ranks(report.path) == {key: site.factors.rank for key, site in sites(p.model).items()}
    assert_same_in_peft(p, build, report.path)


def exact_change(site: Any) -> torch.Tensor:
    """``U D^T Vh`` (d_out, d_in) from the stored tensors, in float64."""
    change = site.delta_weight(torch.float64).detach()
    return change if site.layout == "out_in" else change.T


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("variant", ["antipasto", "antipasto_corda", "antipasto_rot", "lora_xs"])
@pytest.mark.parametrize("max_rank", [1, 3])
def test_pruning_is_the_best_there_is_and_its_error_is_reported(
    name: str, variant: str, max_rank: int, tmp_path: Path
) -> None:
    p = operated(name, variant)
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs, max_rank=max_rank)
    tensors = load_file(report.path / "adapter_model.safetensors")
    assert set(ranks(report.path).values()) == {max_rank}
    for key, site in sites(p.model).items():
        A, B = (tensors[f"base_model.model.{key}.lora_{x}.weight"].double() for x in "AB")
        change = exact_change(site)
        values = torch.linalg.svdvals(change)
        off = torch.linalg.svdvals(change - B @ A)
        said = report.details["sites"][key]
        assert said["pruned"]
        assert said["spectral_error"] == pytest.approx(float(off[0] / values[0]), abs=1e-12)
        assert said["frobenius_error"] == pytest.approx(float(off.norm() / values.norm()), abs=1e-12)
        assert off[0] == pytest.approx(float(values[max_rank]), rel=1e-5, abs=1e-6 * float(values[0]))
        assert off.norm() == pytest.approx(float(values[max_rank:].norm()), rel=1e-5, abs=1e-6 * float(values[0]))
    deviation = (loaded(p, patient(name).model, report.path) - p.run()).abs().max() / p.run().abs().max()
    assert report.max_error == pytest.approx(float(deviation), rel=0.5)
    assert report.max_error > 0


def test_a_bound_above_the_rank_prunes_nothing(tmp_path: Path) -> None:
    p = operated("mlp")
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs, max_rank=16)
    assert not any(site["pruned"] for site in report.details["sites"].values())
    assert_same_in_peft(p, lambda: patient("mlp").model, report.path)


def test_small_directions_are_left_out_on_request(tmp_path: Path) -> None:
    p = operated("mlp", "lora_xs")
    for site in sites(p.model).values():
        scale = torch.tensor([1, 1, 1e-4, 1e-4, 1e-4, 1e-4])
        with torch.no_grad():
            site.core.m.copy_(torch.linalg.qr(site.core.m).Q * scale / site.factors.S)
    exact = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    pruned = export(p.model, "lora", tmp_path / "b", example_inputs=p.inputs, prune_tol=1e-2)
    assert set(ranks(exact.path).values()) == {6}
    assert set(ranks(pruned.path).values()) == {2}
    assert 5e-5 < pruned.details["spectral_error"] < 2e-4
    assert pruned.details["bytes"] < exact.details["bytes"]


@given(data=st.data())
def test_thin_factors_against_a_full_svd(data: st.DataObject) -> None:
    d_out, d_in, stack = (data.draw(st.integers(1, n)) for n in (9, 9, 3))
    r = data.draw(st.integers(1, min(d_out, d_in)))
    rank = data.draw(st.integers(0, r))
    most = data.draw(st.none() | st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    shape = (stack,) if data.draw(st.booleans()) else ()
    draw = lambda *size: torch.randn(*shape, *size, generator=generator, dtype=torch.float64)  # noqa: E731
    B, A = draw(d_out, rank) @ draw(rank, r), draw(r, d_in)
    made = low_rank(B, A, torch.float64, most)
    change = B @ A
    values = torch.linalg.svdvals(change)
    expected = min(max(rank, 1), most or 9)
    assert (made.rank, made.pruned) == (expected, expected < rank)
    off, lost = torch.linalg.svdvals(change - made.product()), values[..., expected:]
    scale = max(float(values.max()), 1.0)
    assert float(off.norm()) == pytest.approx(float(lost.norm()), abs=1e-10 * scale)
    if rank:
        assert made.frobenius_error == pytest.approx(float(off.norm() / values.norm()), abs=1e-10)
        assert made.spectral_error == pytest.approx(float(off.max() / values.max()), abs=1e-10)
    else:
        assert (made.frobenius_error, made.spectral_error) == (0.0, 0.0)
        assert not made.product().any()


def test_a_core_at_identity_stays_in_the_adapter(tmp_path: Path) -> None:
    p = patient("qwen3")
    apply_surgery(p.model, "antipasto", r=6, progress=False)
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert ranks(report.path) == dict.fromkeys(sites(p.model), 1)
    assert report.max_error == 0
    assert torch.equal(loaded(p, patient("qwen3").model, report.path), p.run())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_models_of_other_dtypes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    p = operated(name, dtype=dtype)
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in load_file(report.path / "adapter_model.safetensors").values()} == {wide}
    assert_same_in_peft(p, lambda: patient(name, dtype).model, report.path)


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


@pytest.mark.parametrize("name", test_stacked.BUILD)
def test_stacked_experts_are_target_parameters(name: str, tmp_path: Path) -> None:
    for variant in ("antipasto", surgery.AntiPaSTOAblate(r=4, k=1)):
        p = Patient(
            name, test_stacked.operated(name, variant, target_modules="all-linear"), {"input_ids": test_stacked.IDS}
        )
        trained(p.model)
        report = export(p.model, "lora", tmp_path / str(variant)[:9], example_inputs=p.inputs)
        config = json.loads((report.path / "adapter_config.json").read_text())
        assert f"{test_stacked.EXPERTS}.gate_up_proj" in config["target_parameters"]
        assert_same_in_peft(p, lambda: test_stacked.build(name), report.path)


def within(**members: Any) -> Any:
    """A model with one block, since PEFT wraps modules inside of a model."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        made = {name: member() for name, member in members.items()}
        return nn.Sequential(nn.Tanh(), Forward(members_forward, **made)).eval()

    def members_forward(self: nn.Module, x: torch.Tensor) -> Any:
        return forward(self, x)

    forward = members.pop("forward")
    return build


BLOCKS = {
    "raw": within(forward=lambda self, x: x @ self.w, w=lambda: nn.Parameter(torch.randn(8, 6))),
    "raw_out_in": within(
        forward=lambda self, x: nn.functional.linear(x, self.w), w=lambda: nn.Parameter(torch.randn(6, 8))
    ),
    "conv": within(forward=lambda self, x: self.c(x.T[None])[0].T, c=lambda: nn.Conv1d(8, 6, 1)),
    "in_proj": within(
        forward=lambda self, x: self.m(x[None], x[None], x[None])[0][0],
        m=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    ),
}
INSIDE = within(
    forward=lambda self, x: self.l(x @ self.w), w=lambda: nn.Parameter(torch.randn(8, 8)), l=lambda: nn.Linear(8, 6)
)
APART = within(
    forward=lambda self, x: torch.einsum("nd,dhk->nhk", x, self.w), w=lambda: nn.Parameter(torch.randn(8, 2, 3))
)


@pytest.mark.parametrize("name", BLOCKS)
def test_weights_that_a_called_module_reads(name: str, tmp_path: Path) -> None:
    p = Patient(name, BLOCKS[name](), torch.randn(5, 8))
    operate(p, "antipasto", r=4, exclude_modules=["out_proj"] if name == "in_proj" else None)
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert_same_in_peft(p, BLOCKS[name], report.path)


REFUSED = {
    "raw": (lambda: patient("raw"), None, "'w': its weight is a parameter of the model itself"),
    "attention": (lambda: patient("attention"), None, "1 of 2 .*'in_proj_weight': its weight is a parameter"),
    "in_proj": (
        lambda: Patient("", BLOCKS["in_proj"](), torch.randn(5, 8)),
        None,
        "cannot merge the site '1.m.out_proj'",
    ),
    "out_proj": (lambda: Patient("", BLOCKS["in_proj"](), torch.randn(5, 8)), ["m.in_proj_weight"], "never called"),
    "inside": (lambda: Patient("", INSIDE(), torch.randn(5, 8)), None, "cannot merge the site '1.l' inside of that"),
    "fast_path": (lambda: patient("encoder_layer"), ".*self_attn.*", "linear1.weight, linear2.weight is never called"),
    "attributes": (lambda: patient("encoder_layer"), ".*(out_proj|linear.)", "does not run with PEFT's wrappers"),
    "seen_apart": (lambda: Patient("", APART(), torch.randn(5, 8)), None, r"a weight of shape \(8, 2, 3\) as"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_has_no_place_for_is_listed(name: str, tmp_path: Path) -> None:
    build, excluded, match = REFUSED[name]
    p = operate(build(), exclude_modules=excluded)
    with pytest.raises(ExportError, match=f"{match}.*exclude_modules"):
        export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert list(tmp_path.iterdir()) == []


def test_tied_weights_are_adapted_in_their_place_only(tmp_path: Path) -> None:
    p = operated("qwen3", target_modules=["lm_head", "q_proj"])
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert_close(loaded(p, patient("qwen3").model, report.path), p.run())


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = operated("mlp")

    def refused(model: nn.Module, kind: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            export(model, "lora", tmp_path / "a", **{"example_inputs": p.inputs, **options})

    refused(patient("mlp").model, ExportError, "carries none")
    refused(to_graph(p.model, p.inputs), ExportError, "inlined in a graph")
    for wrong in (0, -1, 1.5, True):
        refused(p.model, ExportError, "max_rank must be", max_rank=wrong)
    refused(p.model, ExportError, "prune_tol must be", prune_tol=1.0)
    refused(p.model, ExportError, "dtype must be", dtype=torch.int8)
    with surgery.steer(p.model, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])):
        refused(p.model, InputError, "site '0': coeff steers the rows")
    for site in sites(p.model).values():
        site.core.g.data[0] = float("nan")
    refused(p.model, ExportError, "site '0': .* not finite")
    big = operated("mlp")
    for site in sites(big.model).values():
        site.core.g.data += 1e6
    refused(big.model, ExportError, "site '0': its factors overflow", dtype=torch.float16)
    steered = patient("mlp")
    contrast = surgery.Contrast([steered.inputs], [steered.inputs + 1])
    options = {"example_inputs": steered.inputs, "calibration": contrast, "target_modules": "all-linear"}
    apply_surgery(steered.model, "sspace", r=4, progress=False, **options)
    refused(steered.model, VariantError, "site '0': .*not linear")
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(operated("mlp").model, ExportError, r"pip install .*\[lora\]")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("factor", ["A", "B"])
def test_factors_that_are_off_by_a_hundredth_are_refused(
    factor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import exporters.lora as module

    def corrupt(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        name = next(name for name in tensors if f"lora_{factor}" in name)
        real({**tensors, name: tensors[name] * 1.01}, *args, **kwargs)

    real = module.save_file
    monkeypatch.setattr(module, "save_file", corrupt)
    p = operated("qwen3")
    with pytest.raises(ExportError, match="something else than was written"):
        export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert list(tmp_path.iterdir()) == []


def test_our_loader_names_a_peft_directory(tmp_path: Path) -> None:
    p = operated("qwen3")
    path = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs).path
    before = p.run()
    with pytest.raises(AdapterError, match=r"is a PEFT adapter.*its own format only"):
        load_adapter(p.model, path)
    assert torch.equal(p.run(), before)
