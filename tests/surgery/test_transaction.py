"""All sites or none: what is refused or interrupted leaves the model as it was, and says what to do."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import surgery
import surgery.verbs.apply
from surgery import apply_surgery, sites, undo_surgery
from tests.support.injected_failures import FAILURES, fails_at, refused
from tests.support.model_state import state_of
from tests.support.operated_models import operate, randomise
from tests.support.zoo import small_model


@pytest.mark.parametrize("r", [0, -1, True, 2.5, "8"])
def test_rank_below_one_or_no_integer(r):
    assert "r must be an integer of at least 1" in refused(small_model("mlp").model, surgery.RankError, r=r)


@pytest.mark.parametrize("rank", [0, 13])
def test_rank_pattern_out_of_range(rank):
    message = refused(small_model("mlp").model, surgery.RankError, rank_pattern={"0": rank})
    assert "site '0' allows 1 to 12" in message


@pytest.mark.parametrize("pattern", [["0"], "0", 4, {0: 4}])
def test_rank_pattern_of_a_wrong_kind(pattern):
    assert "rank_pattern" in refused(small_model("mlp").model, rank_pattern=pattern)


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**63])
def test_any_seed_of_torch_will_do(seed):
    assert len(sites(apply_surgery(small_model("mlp").model, "antipasto", seed=seed, progress=False))) == 3


def test_unknown_variant_lists_the_known_ones():
    message = refused(small_model("mlp").model, surgery.VariantError, variant="antipsto")
    assert "unknown variant 'antipsto'; did you mean 'antipasto'? (known: antipasto" in message


def test_pattern_that_matches_nothing_shows_near_misses_and_what_exists():
    message = refused(small_model("qwen3").model, surgery.TargetError, target_modules=["up_porj"])
    assert "'up_porj'" in message
    assert "did you mean 'up_proj'" in message
    assert "self_attn.q_proj" in message


@pytest.mark.parametrize("target", [5, [5], [["0"]], {"0": 1, 2: 3}])
def test_pattern_that_is_no_text(target):
    assert "target_modules" in refused(small_model("mlp").model, surgery.TargetError, target_modules=target)


@pytest.mark.parametrize("name", ["mlp", "raw", "encoder_layer"])
@pytest.mark.parametrize(
    "inputs", [torch.randn(5, 13, 2), (torch.ones(2),) * 4, {"nonsense": torch.ones(2)}, torch.ones(12).long()]
)
def test_inputs_that_do_not_fit(name, inputs):
    message = refused(small_model(name).model, surgery.InputError, example_inputs=inputs)
    assert "does not run on the example inputs" in message


@pytest.mark.parametrize("inputs", [[torch.ones(5, 12)], 3, "x"])
def test_inputs_of_a_wrong_kind(inputs):
    message = refused(small_model("mlp").model, surgery.InputError, example_inputs=inputs)
    assert f"not {type(inputs).__name__}" in message
    assert "tuple (positional arguments)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["mlp", "attention", "gpt2"])
def test_weights_that_are_not_finite(name, value):
    found = small_model(name)
    key = list(surgery.inspect_sites(found.model, found.inputs).sites)[1]
    with torch.no_grad():
        found.model.get_parameter(key.weight)[1, 2] = value
    message = refused(found.model, surgery.WeightError, example_inputs=found.inputs)
    assert f"site {key.key!r}: 1 of" in message
    assert "not finite" in message


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    for example_inputs in (None, torch.ones(2, 3)):
        assert "load the weights" in refused(model, surgery.WeightError, example_inputs=example_inputs)
    model[0] = nn.Linear(3, 4)
    assert "'1.weight' is on the meta device" in refused(model, surgery.WeightError)


def test_weights_that_are_not_initialised_yet():
    with pytest.raises(surgery.SurgeryError, match=r"not initialised|uninitialised"):
        apply_surgery(nn.Sequential(nn.LazyLinear(4)), "antipasto", progress=False)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_weights_without_entries():
    refused(nn.Sequential(nn.Linear(0, 4)), example_inputs=torch.ones(2, 0))


class Dequantised(nn.Module):
    """An int8 weight that is cast, and perhaps scaled, in each forward."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 12, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(6, 1)) if scaled else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype)
        return nn.functional.linear(x, weight if self.scale is None else weight * self.scale)


@pytest.mark.parametrize("scaled", [False, True])
def test_quantised_parameters_say_what_is_supported(scaled):
    message = refused(nn.Sequential(Dequantised(scaled)), example_inputs=torch.ones(5, 12))
    assert "quantised" in message
    assert "float32" in message


@pytest.mark.parametrize("given", [False, True])
def test_dynamically_quantised_models_say_what_is_supported(given):
    with warnings.catch_warnings(action="ignore"):
        model = torch.ao.quantization.quantize_dynamic(small_model("mlp").model, {nn.Linear}, dtype=torch.qint8)
    message = refused(model, example_inputs=torch.ones(5, 12) if given else None)
    assert "quantised" in message
    assert "float32" in message


def test_an_int8_parameter_without_inputs():
    model = small_model("mlp").model
    model[2].weight = nn.Parameter(torch.ones(20, 24, dtype=torch.int8), requires_grad=False)
    message = refused(model, surgery.WeightError)
    assert "site '2'" in message
    assert "torch.int8, quantised" in message
    assert "supported are plain float16" in message


def test_a_tensor_subclass():
    class Subclass(torch.Tensor):
        pass

    model = small_model("mlp").model
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Subclass))
    assert "Subclass" in refused(model, surgery.WeightError)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"form": "nonsense"}, surgery.InputError),
        ({"lowering": "nonsense"}, surgery.InputError),
        ({"keep_base": False}, surgery.InputError),
        ({"calibration": 3}, surgery.InputError),
        ({"calibration": []}, surgery.InputError),
        ({"calibration": surgery.Contrast([torch.ones(5, 12)], [torch.ones(5, 12)])}, surgery.InputError),
    ],
)
def test_options_that_are_not_there(options, error):
    assert next(iter(options)) in refused(small_model("mlp").model, error, **options)


@pytest.mark.parametrize("name", ["mlp", "attention", "raw", "qwen3"])
def test_surgery_twice_on_one_site(name):
    found = operate(small_model(name))
    randomise(found.model)
    before, output, keys = state_of(found.model), found.run(), "|".join(map(re.escape, sites(found.model)))
    with pytest.raises(surgery.TargetError, match=f"'({keys})' already carries an adapter.*undo_surgery or merge"):
        apply_surgery(found.model, "antipasto", progress=False)
    assert state_of(found.model) == before
    assert torch.equal(found.run(), output)


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize(
    "target",
    ["surgery.hosting.attach.attach", "surgery.planning.adapter_init.check_factors", "surgery.verbs.apply.State"],
)
@pytest.mark.parametrize("name", ["mlp", "raw"])
def test_failure_at_any_site(monkeypatch, name, target, call, after, error):
    found = small_model(name)
    fails_at(monkeypatch, target, 1 if target.endswith("State") else call, error, after=after)
    assert refused(found.model, error, example_inputs=found.inputs) == "injected"


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("name", ["attention", "encoder_layer", "raw"])
def test_failure_in_the_middle_of_a_parametrisation(monkeypatch, name, call, after, error):
    found = small_model(name)
    fails_at(monkeypatch, "torch.nn.utils.parametrize.register_parametrization", call, error, after=after)
    assert refused(found.model, error, example_inputs=found.inputs) == "injected"
    assert not any(parametrize.is_parametrized(module) for module in found.model.modules())


@pytest.mark.parametrize("error", FAILURES)
def test_failure_while_lowerings_are_timed(monkeypatch, error):
    """The last step of surgery."""
    found = small_model("mlp")
    fails_at(monkeypatch, "surgery.verbs.apply.measure", 1, error)
    options = {"lowering": "measure", "example_inputs": found.inputs}
    assert refused(found.model, error, progress=True, **options) == "injected"


@pytest.mark.parametrize("error", FAILURES)
def test_failure_of_a_second_surgery_keeps_the_first(monkeypatch, error):
    found = operate(small_model("mlp"), target_modules=["0"])
    randomise(found.model)
    before, output = state_of(found.model), found.run()
    fails_at(monkeypatch, "surgery.hosting.attach.attach", 2, error)
    with pytest.raises(error, match="injected"):
        operate(found, target_modules=["2", "4"])
    assert state_of(found.model) == before
    assert torch.equal(found.run(), output)


@pytest.mark.parametrize(("name", "first", "second"), [("mlp", "0", "4"), ("raw", "w", "out"), ("raw", "twice", "v")])
def test_second_surgery_on_disjoint_sites(name, first, second):
    found = small_model(name)
    before, base = state_of(found.model), found.run()
    operate(found, target_modules=[first], r=3)
    randomise(found.model)
    output = found.run()
    operate(found, target_modules=[second], variant=surgery.AntiPaSTO(r=2, suppress_only=True), r=None)
    assert {key: len(site.factors.S) for key, site in sites(found.model).items()} == {first: 3, second: 2}
    assert torch.equal(found.run(), output)
    trainable = [name for name, p in found.model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2
    assert all(name.endswith("core.g") for name in trainable)
    undo_surgery(found.model)
    assert state_of(found.model) == before
    assert torch.equal(found.run(), base)
