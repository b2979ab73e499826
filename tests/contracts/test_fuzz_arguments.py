"""Arguments of every type where each verb wants one: a typed error or a good result, and the model as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import surgery
from exporters import check_core, export, export_core, merge_checkpoint, swap
from surgery import (
    Contrast,
    SurgeryError,
    apply_surgery,
    calibrate,
    load_adapter,
    merge,
    recalibrate,
    save_adapter,
    set_coeff,
    sites,
    steer,
    to_graph,
    undo_surgery,
)
from surgery.variants import REGISTRY
from tests.support.fuzz import ESCAPE, SOME, junk, outcome
from tests.support.model_state import state_of
from tests.support.zoo import small_model

INPUTS = small_model("mlp").inputs


def fresh() -> nn.Module:
    return apply_surgery(small_model("mlp").model, "antipasto", r=2, progress=False)


def steered(model: nn.Module, value: Any) -> None:
    with steer(model, value):
        pass


APPLY = (
    "variant", "r", "target_modules", "exclude_modules", "layers_to_transform", "rank_pattern", "example_inputs",
    "calibration", "form", "lowering", "keep_base", "seed", "progress",
)  # fmt: skip
CALIBRATE = ("variant", "r", "calibration", "target_modules", "layers_to_transform", "progress")


def check(call: Callable[[nn.Module, Any], Any], make: Callable[[], nn.Module], values: list[Any]) -> None:
    """Each value gives a typed error, and the model is untouched, or a model that still works."""
    model = make()
    before = state_of(model)
    for value in values:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            error = outcome(lambda: call(model, value), seconds=60)  # noqa: B023
        if error is None:
            model = make()  # whatever was done was asked for
            before = state_of(model)
        else:
            assert state_of(model) == before, repr(value)[:100]


@pytest.mark.parametrize("name", APPLY)
def test_apply_surgery(name):
    def call(model: nn.Module, value: Any) -> None:
        apply_surgery(model, **{"variant": "antipasto", "r": 2, "progress": False, name: value})
        assert sites(model)
        undo_surgery(model)

    check(call, lambda: small_model("mlp").model, junk())


@pytest.mark.parametrize("name", CALIBRATE)
def test_calibrate(name):
    options = {"variant": "antipasto", "r": 2, "calibration": [INPUTS], "progress": False}
    check(lambda model, value: calibrate(model, **{**options, name: value}), lambda: small_model("mlp").model, junk())


VERBS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "set_coeff": set_coeff,
    "steer": steered,
    "recalibrate calibration": lambda m, v: recalibrate(m, v, reset=True, progress=False),
    "recalibrate reset": lambda m, v: recalibrate(m, [INPUTS], reset=v, progress=False),
    "recalibrate seed": lambda m, v: recalibrate(m, [INPUTS], reset=True, seed=v, progress=False),
    "merge untie": lambda m, v: merge(m, untie=v),
    "merge progress": lambda m, v: merge(m, progress=v),
    "to_graph form": lambda m, v: to_graph(m, INPUTS, form=v),
    "to_graph keep_base": lambda m, v: to_graph(m, INPUTS, keep_base=v),
    "to_graph verify": lambda m, v: to_graph(m, INPUTS, verify=v),
    "save_adapter path": save_adapter,
    "save_adapter factors": lambda m, v: save_adapter(m, "saved", factors=v),
    "load_adapter path": load_adapter,
    "export format": lambda m, v: export(m, v, "exported"),
    "export path": lambda m, v: export(m, "dense", v),
    "export_core path": export_core,
    "export_core onnx_path": lambda m, v: export_core(m, "core.onnx_adapter", onnx_path=v),
    "swap loaded": lambda m, v: swap(v, m),
    "swap adapter": lambda m, v: swap(m, v),
    "swap coeff": lambda m, v: swap(m, coeff=v),
    "check_core": lambda m, v: check_core(v, "x"),
    "merge_checkpoint base": lambda m, v: merge_checkpoint(v, "saved", "out", progress=False),
    "merge_checkpoint adapter": lambda m, v: merge_checkpoint("base", v, "out", progress=False),
    "merge_checkpoint out": lambda m, v: merge_checkpoint("base", "saved", v, progress=False),
    "merge_checkpoint coeff": lambda m, v: merge_checkpoint("base", "saved", "out", coeff=v, progress=False),
    "merge_checkpoint untie": lambda m, v: merge_checkpoint("base", "saved", "out", untie=v, progress=False),
}


@pytest.mark.parametrize("name", VERBS)
def test_verbs_on_an_operated_model(name, tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    check(VERBS[name], fresh, [value for value in junk() if not isinstance(value, str) or ".." not in value])
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


MODELS = (
    "undo_surgery", "merge", "refresh", "sites", "inspect_sites", "report", "print_trainable_parameters", "to_graph",
)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_model(name):
    for value in junk():
        if not isinstance(value, nn.Module):
            error = outcome(lambda: getattr(surgery, name)(value))  # noqa: B023
            assert isinstance(error, SurgeryError), repr(value)[:100]
    calls: list[Callable[[Any], Any]] = [
        lambda v: save_adapter(v, "x"),
        lambda v: load_adapter(v, "x"),
        lambda v: set_coeff(v, 1.0),
        lambda v: export(v, "dense", "x"),
        lambda v: apply_surgery(v, "antipasto", progress=False),
    ]
    for call in calls:
        for value in (None, 3, "x", [], object(), nn.Linear):
            assert isinstance(outcome(lambda: call(value)), SurgeryError)  # noqa: B023
    assert not Path("x").exists()


@pytest.mark.parametrize("variant", sorted(REGISTRY))
def test_settings_of_variants(variant):
    for field in dataclasses.fields(REGISTRY[variant]):
        for value in junk():
            outcome(lambda: REGISTRY[variant](**{field.name: value}))  # noqa: B023
    assert outcome(lambda: REGISTRY[variant](r=0))


def test_pool_of_a_contrast():
    assert all(outcome(lambda: Contrast([], [], value)) for value in junk())  # noqa: B023


@SOME
@given(
    pattern=st.text(max_size=20)
    | st.lists(st.text(max_size=5), max_size=3)
    | st.sampled_from(["(", "*", "[a-", ESCAPE])
)
def test_patterns(pattern):
    model = small_model("mlp").model
    before = state_of(model)
    for name in ("target_modules", "exclude_modules"):
        options = {"target_modules": "all-linear", "variant": "antipasto", "r": 2, "progress": False, name: pattern}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if outcome(lambda: apply_surgery(model, **options)) is None:  # noqa: B023
                undo_surgery(model)
        assert state_of(model) == before


def test_a_pattern_that_backtracks_is_harmless_on_names_that_it_does_not_fit():
    """The caller writes patterns, no file does. What takes long is a match on a long run of one kind."""
    model = small_model("mlp").model
    error = outcome(lambda: apply_surgery(model, "antipasto", target_modules="(a+)+$", progress=False))
    assert isinstance(error, surgery.TargetError)
