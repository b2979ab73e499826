"""Residual form in place: the same function, the base weight aside or gone, and all verbs as ever."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import surgery
from surgery import apply_surgery, load_adapter, merge, save_adapter, set_coeff, sites, steer, undo_surgery
from surgery.modules.adapter import Adapter
from surgery.verbs.calibrate import recalibrate
from tests.support.lowering_models import PLAIN, inputs, model_of, reference, shake
from tests.support.tolerance import assert_close
from tests.support.zoo import small_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def operated(variant: Any = "antipasto", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    options = {"target_modules": "all-linear", "example_inputs": inputs(dtype), "progress": False, **options}
    return shake(apply_surgery(model_of(dtype), variant, r=8, form="residual", **options))


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", PLAIN)
def test_it_is_the_same_function(variant: str, dtype: torch.dtype) -> None:
    model, x = operated(variant, dtype), inputs(dtype)
    assert all(type(site) is Adapter for site in sites(model).values())
    for coeff in (1.0, -0.5, 0.0, torch.linspace(-1, 1, len(x))):
        set_coeff(model, coeff)
        delta = copy.deepcopy(undone_and_loaded(model, variant, dtype))
        assert_close(model(x), reference(delta, x), dtype)
        with torch.no_grad():
            assert_close(model(x), reference(delta, x), dtype)
    set_coeff(model, 0.0)
    assert_close(model(x), model_of(dtype)(x), dtype)


def undone_and_loaded(model: nn.Module, variant: str, dtype: torch.dtype) -> nn.Module:
    """The same adapters in delta form."""
    options = {"target_modules": "all-linear", "example_inputs": inputs(dtype), "progress": False}
    delta = apply_surgery(model_of(dtype), variant, r=8, **options)
    for key, site in sites(delta).items():
        site.core.load_state_dict(sites(model)[key].core.state_dict())
        site.steering.coeff = sites(model)[key].steering.coeff.clone()
    return delta


def test_gradients_are_those_of_delta_form() -> None:
    model = operated(dtype=torch.float64)
    duplicate = undone_and_loaded(model, "antipasto", torch.float64)
    for one in (model, duplicate):
        one(inputs(torch.float64)).square().sum().backward()
    for key, site in sites(model).items():
        assert_close(site.core.g.grad, sites(duplicate)[key].core.g.grad, torch.float64)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", ["mlp", "raw", "encoder_layer", "qwen3", "gpt2"])
def test_undo_gives_back_the_very_parameters(name: str) -> None:
    p = small_model(name)
    before = {key: (id(t), t.clone(), t.requires_grad) for key, t in p.model.named_parameters()}
    classes, base = [type(m) for m in p.model.modules()], p.run()
    apply_surgery(p.model, "antipasto", r=6, form="residual", example_inputs=p.inputs, progress=False)
    shake(p.model)
    forms = {key: site.form for key, site in sites(p.model).items()}
    called = {key for key, site in sites(p.model).items() if site.host.name == "module"}
    assert forms == {key: "residual" if key in called else "delta" for key in forms}
    assert not [key for key in called if f"{key}.weight" in p.model.state_dict()]
    assert not torch.equal(p.run(), base)
    undo_surgery(p.model)
    after = list(p.model.named_parameters())
    assert [key for key, _ in after] == list(before)
    for key, tensor in after:
        assert (id(tensor), tensor.requires_grad) == (before[key][0], before[key][2])
        assert torch.equal(tensor, before[key][1])
    assert [type(m) for m in p.model.modules()] == classes
    assert torch.equal(p.run(), base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_a_base_that_is_not_kept(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    p = small_model(name, dtype)
    base = copy.deepcopy(p.model)
    options: dict[str, Any] = {"form": "residual", "example_inputs": p.inputs, "progress": False}
    apply_surgery(p.model, "antipasto", r=6, keep_base=False, **options)
    shake(p.model)
    live = p.run()
    found = sites(p.model)
    for key, site in found.items():
        assert site.weight.shape == base.get_parameter(f"{key}.weight").shape
        assert site.base_error <= 1e-6
    for refused in (
        lambda: undo_surgery(p.model),
        lambda: recalibrate(p.model, [p.inputs]),
        lambda: surgery.to_graph(p.model, p.inputs),
    ):
        with pytest.raises(surgery.SurgeryError, match="keep_base=False"):
            refused()
    save_adapter(p.model, tmp_path / "adapter")
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    assert_close(p.run(loaded), live, dtype)
    merged = merge(copy.deepcopy(p.model))
    assert not sites(merged)
    assert [key for key, _ in merged.named_parameters()] == [key for key, _ in base.named_parameters()]
    assert_close(p.run(merged), live, dtype)
    assert_close(p.run(merge(loaded)), p.run(merged), dtype)


def test_a_failure_leaves_the_weights_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    before = {key: id(t) for key, t in model.named_parameters()}
    real, calls = Adapter.split, []

    def split(site: Adapter) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(site)

    monkeypatch.setattr(Adapter, "split", split)
    options: dict[str, Any] = {"target_modules": "all-linear", "example_inputs": inputs(), "progress": False}
    with pytest.raises(MemoryError):
        apply_surgery(model, "antipasto", r=8, form="residual", keep_base=False, **options)
    assert {key: id(t) for key, t in model.named_parameters()} == before
    assert not sites(model)


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_keeps_the_remainder_wide(dtype: torch.dtype, keep_base: bool) -> None:
    model = operated(keep_base=keep_base)
    duplicate = undone_and_loaded(model, "antipasto", torch.float32).to(dtype)
    model.to(dtype)
    for site in sites(model).values():
        assert site.W_res.dtype == torch.promote_types(dtype, torch.float32)
        assert site.weight.dtype == dtype
    # the weight and its factors are rounded apart: what a half dtype allows, and float32's rounding in float64
    assert_close(
        model(inputs(dtype)), reference(duplicate, inputs(dtype)), min(dtype, torch.float32, key=lambda d: d.itemsize)
    )
    if keep_base:
        assert all(p.dtype == dtype for p in undo_surgery(model).parameters())


def test_copies_are_independent_and_state_loads() -> None:
    model, x = operated(), inputs()
    duplicate, expected = copy.deepcopy(model), model(x).detach()
    undo_surgery(model)
    assert torch.equal(duplicate(x), expected)
    other = operated()
    set_coeff(other, 1.0)
    other.load_state_dict(duplicate.state_dict())
    assert torch.equal(other(x), expected)
    undo_surgery(duplicate)
    assert torch.equal(duplicate(x), model(x))


def test_it_compiles_once_and_steers() -> None:
    model, x = operated(), inputs()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for coeff in (1.0, 0.0, -0.5):
            with steer(model, coeff):
                assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_a_tied_weight_stays_with_its_other_reader(tmp_path: Path) -> None:
    p = small_model("qwen3")
    base = p.run()
    apply_surgery(p.model, "antipasto", r=6, target_modules=["lm_head"], form="residual", progress=False)
    shake(p.model)
    assert p.model.get_input_embeddings().weight is sites(p.model)["lm_head"].weight
    with pytest.raises(surgery.WeightError, match="shares its weight"):
        merge(p.model)
    live = p.run()
    assert_close(p.run(merge(copy.deepcopy(p.model), untie=True)), live)
    undo_surgery(p.model)
    assert p.model.get_input_embeddings().weight is p.model.lm_head.weight
    assert torch.equal(p.run(), base)


def test_recalibration_and_another_core_keep_the_form(tmp_path: Path) -> None:
    model, x = operated(), inputs()
    save_adapter(model, tmp_path / "adapter")
    expected = model(x).detach()
    recalibrate(model, [x], reset=True, progress=False)
    assert all(type(site) is Adapter for site in sites(model).values())
    load_adapter(model, tmp_path / "adapter")
    assert all(type(site) is Adapter for site in sites(model).values())
    assert torch.equal(model(x), expected)


def test_words_for_it_and_refusals() -> None:
    options: dict[str, Any] = {"target_modules": "all-linear", "example_inputs": inputs(), "progress": False}
    model = apply_surgery(model_of(), "antipasto", r=8, lowering="residual", **options)
    assert {site.form for site in sites(model).values()} == {"residual"}
    assert {site.lowering for site in surgery.report(model).sites} == {"residual"}
    with pytest.raises(surgery.InputError, match="has one lowering"):
        apply_surgery(model_of(), "antipasto", r=8, form="residual", lowering="dense", **options)
    with pytest.raises(surgery.InputError, match="needs form='residual'"):
        apply_surgery(model_of(), "antipasto", r=8, keep_base=False, **options)


def test_coeff_may_change_before_the_backward() -> None:
    model, x = operated(), inputs()
    with steer(model, 0.5):
        loss = model(x).square().sum()
    loss.backward()
    found = {key: site.core.g.grad.clone() for key, site in sites(model).items()}
    model.zero_grad()
    set_coeff(model, 0.5)
    model(x).square().sum().backward()
    for key, site in sites(model).items():
        assert_close(site.core.g.grad, found[key])


def test_autocast_gives_what_a_linear_module_gives() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert operated()(inputs()).dtype == model_of()(inputs()).dtype == torch.bfloat16


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("targets", [["0", "2"], ["2"]])
def test_a_merge_does_not_untie_unasked(targets: list[str], keep_base: bool) -> None:
    options: dict[str, Any] = {"form": "residual", "keep_base": keep_base, "progress": False}
    model = apply_surgery(tied(), "antipasto", r=8, target_modules=targets, example_inputs=inputs(), **options)
    shake(model)
    with pytest.raises(surgery.WeightError, match="shares its weight"):
        merge(model)
    live = model(inputs())
    assert_close(merge(copy.deepcopy(model), untie=True)(inputs()), live)
    model.to(torch.bfloat16)
    undo_surgery(model)
    assert model[0].weight is model[2].weight
    assert model[0].weight.dtype == torch.bfloat16


def test_a_failure_while_bases_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    before = {key: (id(t), t.clone()) for key, t in model.named_parameters()}
    real, calls = surgery.modules.base_weights.fingerprint, []

    def fail(weight: torch.Tensor) -> str:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(weight)

    monkeypatch.setattr("surgery.modules.base_weights.fingerprint", fail)
    options: dict[str, Any] = {"target_modules": "all-linear", "example_inputs": inputs(), "progress": False}
    with pytest.raises(KeyboardInterrupt):
        apply_surgery(model, "antipasto", r=8, form="residual", keep_base=False, **options)
    for key, tensor in model.named_parameters():
        assert id(tensor) == before[key][0]
        assert torch.equal(tensor, before[key][1])


def test_a_state_of_another_base_is_what_is_merged() -> None:
    model, other, x = operated(), operated(), inputs()
    for site in sites(other).values():
        site.W_res.mul_(1.5)
    model.load_state_dict(other.state_dict())
    live = model(x)
    assert_close(live, other(x))
    assert_close(merge(model)(x), live)


@pytest.mark.parametrize("keep_base", [True, False])
def test_parameters_are_counted_as_in_delta_form(keep_base: bool, capsys: pytest.CaptureFixture[str]) -> None:
    surgery.print_trainable_parameters(operated(keep_base=keep_base))
    surgery.print_trainable_parameters(undone_and_loaded(operated(), "antipasto", torch.float32))
    one, other = capsys.readouterr().out.splitlines()
    assert one == other


def test_an_adapter_without_a_base_is_not_saved_after_a_cast(tmp_path: Path) -> None:
    with pytest.raises(surgery.AdapterError, match="cast after its base was dropped"):
        save_adapter(operated(keep_base=False).to(torch.bfloat16), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_hub_model_ties_its_weights_again_and_generates() -> None:
    p = small_model("qwen3")
    apply_surgery(p.model, "antipasto", r=6, target_modules=["lm_head", "q_proj"], form="residual", progress=False)
    p.model.tie_weights()
    with pytest.raises(surgery.SurgeryError, match="cannot be replaced"):
        p.model.lm_head.weight = nn.Parameter(torch.zeros(64, 32))
    assert p.model.generate(p.inputs["input_ids"], max_new_tokens=3, do_sample=False).shape[1] == 10


def test_meta_and_names_that_a_module_has_already() -> None:
    assert operated().to("meta").to_empty(device="cpu")(inputs()).shape == (6, 5, 16)
    model = model_of()
    model[0].W_res, model[2].form = 3, "mine"
    options: dict[str, Any] = {"target_modules": "all-linear", "example_inputs": inputs(), "progress": False}
    apply_surgery(model, "antipasto", r=8, form="residual", **options)
    assert {site.form for site in sites(model).values()} == {"residual"}
    assert (model[0].W_res, model[2].form) == (3, "mine")
    undo_surgery(model)
    assert (model[0].W_res, model[2].form) == (3, "mine")
