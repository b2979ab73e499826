"""Recalibration: new factors with new cores or nothing, in place and in graphs; undo still gives the first model."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import fx, nn

import surgery
from surgery import (
    Contrast,
    apply_surgery,
    calibrate,
    load_adapter,
    merge,
    recalibrate,
    save_adapter,
    set_coeff,
    sites,
    to_graph,
    undo_surgery,
)
from tests.support.injected_failures import FAILURES, fails_at
from tests.support.model_state import state_of
from tests.support.operated_models import randomise
from tests.support.tolerance import assert_close
from tests.support.zoo import SmallModel, small_model

NAMES = ("mlp", "raw", "attention", "encoder_layer", "gpt2")
GRAPHS = ("symbolic", "exported", "delta", "residual")
each_name = pytest.mark.parametrize("name", NAMES)
each_graph = pytest.mark.parametrize("kind", GRAPHS)


def data_of(name: str, seed: int = 0, rows: int = 6) -> Any:
    """A batch that fits a model, with directions of very different weight."""
    generator = torch.Generator().manual_seed(seed)
    if name == "gpt2":
        return {"input_ids": torch.randint(0, 64, (rows, 9), generator=generator)}
    if name in ("mlp", "raw"):
        return torch.randn(8 * rows, 12, generator=generator) * torch.rand(12, generator=generator) ** 4 * 9
    x = torch.randn(rows, 9, 16, generator=generator) * torch.rand(16, generator=generator) ** 4 * 9
    return (x, x, x) if name == "attention" else x


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What every site holds, and which objects its core has."""
    return {
        key: (
            [t.clone() for t in (site.factors.U, site.factors.S, site.factors.Vh, site.weight)],
            {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in site.core.named_parameters()},
            site.steering.coeff.clone(),
            site.variant,
        )
        for key, site in sites(model).items()
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(equal, a, b))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        return bool(a == b)

    return equal(left, right)


@functools.cache
def _plain(name: str) -> SmallModel:
    found = small_model(name)
    apply_surgery(found.model, "antipasto", r=4, example_inputs=found.inputs, progress=False)
    return found


def operate(name: str, variant: Any = "antipasto", r: int = 4, **options: Any) -> SmallModel:
    """A model after surgery, its cores at their initial values."""
    if (variant, r, options) == ("antipasto", 4, {}):
        return copy.deepcopy(_plain(name))
    found = small_model(name)
    apply_surgery(found.model, variant, r=r, example_inputs=found.inputs, progress=False, **options)
    return found


def graph(kind: str) -> tuple[Any, fx.GraphModule, Any]:
    """The output of a graph before surgery, the operated graph, and its inputs."""
    return copy.deepcopy(_graph(kind))


@functools.cache
def _graph(kind: str) -> tuple[Any, fx.GraphModule, Any]:
    found = small_model("raw")
    if kind in ("delta", "residual"):
        base = found.run()
        apply_surgery(found.model, "antipasto", r=4, example_inputs=found.inputs, progress=False)
        return base, to_graph(found.model, found.inputs, form=kind), found.inputs
    model: Any = fx.symbolic_trace(found.model)
    if kind == "exported":
        rows = torch.export.Dim.DYNAMIC
        model = torch.export.export(found.model, (found.inputs,), dynamic_shapes=({0: rows},)).module()
    base = found.run(model)
    return base, apply_surgery(model, "antipasto", r=4, example_inputs=found.inputs, progress=False), found.inputs


@each_name
@pytest.mark.parametrize("variant", ["antipasto", "antipasto_corda"])
def test_as_if_operated_on_with_that_data(name, variant):
    plain, first, second = small_model(name), data_of(name), data_of(name, 1)
    before, base = state_of(plain.model), plain.run()
    needed = {"calibration": [first]} if variant == "antipasto_corda" else {}
    apply_surgery(plain.model, variant, r=4, example_inputs=plain.inputs, progress=False, **needed)
    old = snapshot(plain.model)
    names = [name for name, _ in plain.model.named_parameters()]
    keys, set_to = list(plain.model.state_dict()), torch.tensor(0.5)
    set_coeff(plain.model, 0.5)
    assert recalibrate(plain.model, [second], progress=False) is plain.model
    expected = operate(name, variant, calibration=[second]).model
    assert list(sites(plain.model)) == list(sites(expected))
    for key, site in sites(expected).items():
        found = sites(plain.model)[key]
        for factor in ("U", "S", "Vh"):
            assert torch.equal(getattr(found.factors, factor), getattr(site.factors, factor))
        assert not found.core.g.any()
        assert found.core.g.requires_grad
        assert id(found.core.g) != old[key][1]["g"][0]
        assert torch.equal(found.steering.coeff, set_to)
        assert (found.variant, len(found.factors.S)) == (old[key][3], 4)
    changed = [key for key in old if not torch.equal(old[key][0][2], sites(plain.model)[key].factors.Vh)]
    assert changed
    assert [name for name, _ in plain.model.named_parameters()] == names
    assert list(plain.model.state_dict()) == keys
    assert torch.equal(plain.run(), base)
    randomise(plain.model)
    assert not torch.equal(plain.run(), base)
    undo_surgery(plain.model)
    assert state_of(plain.model) == before
    assert torch.equal(plain.run(), base)


@each_graph
def test_graphs(kind, tmp_path):
    base, model, inputs = graph(kind)
    set_coeff(model, -0.7)
    second = data_of("raw", 1)
    assert recalibrate(model, [second], progress=False) is model
    expected = operate("raw", calibration=[second]).model
    assert set(sites(model)) == set(sites(expected))
    for key, site in sites(expected).items():
        found = sites(model)[key]
        for factor in ("U", "S", "Vh"):
            assert_close(getattr(found.factors, factor), getattr(site.factors, factor))
        assert float(found.steering.coeff) == pytest.approx(-0.7)
        assert found.form == ("residual" if kind == "residual" else "delta")
    set_coeff(randomise(expected), -0.7)
    for key, site in sites(model).items():
        site.core.load_state_dict(sites(expected)[key].core.state_dict())
    with torch.no_grad():
        assert_close(model(inputs), expected(inputs))
    save_adapter(model, tmp_path / "a")
    reloaded = load_adapter(small_model("raw").model, tmp_path / "a")
    with torch.no_grad():
        assert_close(set_coeff(reloaded, -0.7)(inputs), expected(inputs))
        dense = merge(copy.deepcopy(model))
        assert_close(dense(inputs), expected(inputs))
        assert_close(undo_surgery(model)(inputs), base)
        if kind in ("symbolic", "exported"):
            assert torch.equal(model(inputs), base)
    assert sites(model) == {}


@pytest.mark.parametrize("kind", ["in place", *GRAPHS])
def test_a_trained_core_is_refused_unless_reset(kind):
    _, model, inputs = graph(kind) if kind != "in place" else (None, operate("raw").model, small_model("raw").inputs)
    key = list(sites(model))[2]
    with torch.no_grad():
        sites(model)[key].core.g[1] = 1e-6
        before, output = snapshot(model), model(inputs)
        for data in ([data_of("raw", 1)], iter([data_of("raw", 1)])):
            with pytest.raises(
                surgery.SurgeryError, match=rf"site '{key}': its core is not at its initial.*reset=True"
            ):
                recalibrate(model, data, progress=False)
        assert same(before, snapshot(model))
        assert torch.equal(model(inputs), output)
    recalibrate(model, [data_of("raw", 1)], reset=True, progress=False)
    assert not any(site.core.g.any() for site in sites(model).values())
    recalibrate(model, [data_of("raw", 1)], progress=False)


@pytest.mark.parametrize(
    "variant", ["antipasto_ablate", "antipasto_dplr", "antipasto_rot", "lora_xs", "antipasto_arrow"]
)
def test_initial_cores_of_random_numbers_are_known_by_their_seed(variant):
    model = operate("mlp", variant, target_modules="all-linear", seed=5).model
    recalibrate(model, [data_of("mlp")], seed=9, progress=False)
    recalibrate(model, [data_of("mlp", 1)], seed=2, progress=False)
    expected = operate("mlp", variant, target_modules="all-linear", seed=2).model
    for key, site in sites(expected).items():
        for name, parameter in site.core.named_parameters():
            assert torch.equal(sites(model)[key].core.get_parameter(name), parameter)
    with torch.no_grad():
        next(sites(model)["2"].core.parameters()).add_(1e-3)
    with pytest.raises(surgery.SurgeryError, match="site '2'"):
        recalibrate(model, [data_of("mlp")], progress=False)


def test_a_contrast_turns_the_direction():
    model, x = small_model("mlp").model, data_of("mlp")
    options = {"r": 4, "target_modules": "all-linear", "progress": False}
    apply_surgery(model, "sspace", calibration=Contrast([x], [x + 1]), **options)
    new = Contrast([x], [x.flip(1)], pool="mean")
    recalibrate(model, new, progress=False)
    expected = apply_surgery(small_model("mlp").model, "sspace", calibration=new, **options)
    for key, site in sites(expected).items():
        assert torch.equal(sites(model)[key].core.direction, site.core.direction)
    with pytest.raises(surgery.InputError, match=r"must be Contrast\(positive, negative\)"):
        recalibrate(model, [x], progress=False)


def test_statistics_serve_in_place_of_data():
    name = "gpt2"
    data, model, other = data_of(name, 1), operate(name).model, operate(name).model
    statistics = calibrate(small_model(name).model, "antipasto", [data], r=4, progress=False)
    recalibrate(model, statistics, progress=False)
    recalibrate(other, [data], progress=False)
    for key, site in sites(model).items():
        assert_close(site.factors.Vh, sites(other)[key].factors.Vh)


def test_sites_of_different_variants_and_ranks():
    model, x = small_model("mlp").model, data_of("mlp", 1)
    apply_surgery(model, "antipasto", r=3, target_modules=["0"], progress=False)
    apply_surgery(model, "antipasto_asvd", r=5, target_modules=["2"], calibration=[x], progress=False)
    apply_surgery(model, surgery.AntiPaSTO(pool="mean_abs", r=2), target_modules=["4"], progress=False)
    old = snapshot(model)
    recalibrate(model, [x], progress=False)
    found = sites(model)
    assert {key: (site.variant, len(site.factors.S)) for key, site in found.items()} == {
        "0": (old["0"][3], 3),
        "2": (old["2"][3], 5),
        "4": (old["4"][3], 2),
    }
    expected = small_model("mlp").model
    apply_surgery(expected, old["4"][3], target_modules=["4"], calibration=[x], progress=False)
    assert_close(found["4"].factors.Vh, sites(expected)["4"].factors.Vh)


def test_one_calibration_cannot_serve_a_contrast_and_a_moment():
    model, x = small_model("mlp").model, data_of("mlp")
    apply_surgery(model, "antipasto", r=4, target_modules=["0"], progress=False)
    contrast = Contrast([x], [x + 1])
    apply_surgery(model, "sspace", r=4, target_modules=["2"], calibration=contrast, progress=False)
    before = snapshot(model)
    for data in ([x], contrast):
        with pytest.raises(surgery.InputError) as caught:
            recalibrate(model, data, progress=False)
        assert "site '0'" in str(caught.value)
        assert "site '2'" in str(caught.value)
        assert same(before, snapshot(model))


def test_flags_and_modes_stay_what_they_are():
    model = operate("mlp", target_modules=["0", "2"]).model.train()
    model[2].eval()
    model[4].bias.requires_grad_(True)
    sites(model)["0"].core.g.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    recalibrate(model, [data_of("mlp")], progress=False)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("target", "call"), [
    ("surgery.hosting.attach.attach", 2), ("surgery.planning.adapter_init.check_factors", 2),
    ("surgery.verbs.apply.State", 1),
    ("surgery.modules.base_weights.fingerprint", 2), ("surgery.verbs.replace_adapters.check_weight", 3),
    ("surgery.hosting.graph_surgery.register_sites", 1),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["mlp", "attention", "residual", "exported"])
def test_failure_at_any_step_puts_the_old_adapters_back(monkeypatch, kind, target, call, after, error):
    name = kind if kind in NAMES else "raw"
    plain = small_model(name)
    base, model, inputs = (plain.run(), operate(name).model, plain.inputs) if kind in NAMES else graph(kind)
    randomise(model)
    set_coeff(model, 0.3)
    before, parameters = snapshot(model), {n: id(p) for n, p in model.named_parameters() if "core" in n}
    output = plain.run(model, inputs)
    with monkeypatch.context() as patched:
        module = (
            "surgery.hosting.attach"
            if target == "surgery.hosting.graph_surgery.register_sites"
            else target.rpartition(".")[0]
        )
        fails_at(patched, f"{module}.{target.rpartition('.')[2]}", call, error, after=after)
        try:
            recalibrate(model, [data_of(name, 1)], reset=True, progress=False)
        except error as caught:
            assert str(caught) == "injected"  # noqa: PT017
        else:
            return  # a step that this host does not take so often
    assert same(before, snapshot(model))
    assert {n: id(p) for n, p in model.named_parameters() if "core" in n} == parameters
    assert torch.equal(plain.run(model, inputs), output)
    undo_surgery(model)
    assert_close(plain.run(model, inputs), base)
    assert kind == "residual" or torch.equal(plain.run(model, inputs), base)


@pytest.mark.parametrize("kind", ["mlp", "attention", "residual"])
@pytest.mark.parametrize(("data", "message"), [
    ([], "gave no batch"), (None, "needs calibration data"), (3, "must be an iterable"),
    ("few", "fewer than its rank"), ("nan", "is not finite"),
])  # fmt: skip
def test_data_that_is_refused_changes_nothing(kind, data, message):
    name = kind if kind in NAMES else "raw"
    model = operate(name).model if kind in NAMES else graph(kind)[1]
    good = data_of(name)
    part = (lambda t: t[:1]) if name != "attention" else (lambda t: tuple(x[:1, :2] for x in t))
    data = [part(good)] if data == "few" else data
    bad = tuple(x * float("nan") for x in good) if name == "attention" else None
    data = [good, bad or good * float("nan")] if data == "nan" else data
    before = snapshot(model)
    with pytest.raises(surgery.InputError, match=message):
        recalibrate(model, data, progress=False)
    assert same(before, snapshot(model))


def test_a_plain_model_and_a_base_that_was_not_kept():
    with pytest.raises(surgery.SurgeryError, match="carries no surgery"):
        recalibrate(small_model("mlp").model, [data_of("mlp")], progress=False)
    found = operate("raw")
    model = to_graph(found.model, found.inputs, form="residual", keep_base=False)
    before = snapshot(model)
    with pytest.raises(surgery.SurgeryError, match="keep_base"):
        recalibrate(model, [data_of("raw")], progress=False)
    assert same(before, snapshot(model))
