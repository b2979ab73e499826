"""The verbs on an operated model: steering, merging, reporting, counting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

import surgery
from surgery import merge, report, set_coeff, sites, steer, undo_surgery
from tests.support.model_state import state_of
from tests.support.operated_models import each_dtype, each_model, operate, operated, reference
from tests.support.tolerance import RELATIVE, assert_close, relative_error
from tests.support.zoo import HUB_NAMES, SmallModel, small_model

CALLED = ("mlp", *HUB_NAMES)  # models all of whose sites are modules
MODEL_VERBS = {
    "undo_surgery": undo_surgery,
    "merge": merge,
    "set_coeff": lambda model: set_coeff(model, 1.0),
    "steer": lambda model: steer(model, 1.0).__enter__(),
    "refresh": surgery.refresh,
    "report": report,
    "save_adapter": lambda model: surgery.save_adapter(model, "never-written"),
}


def coefficients(model: nn.Module) -> list[Any]:
    return [site.steering.coeff.tolist() for site in sites(model).values()]


class Flattening(nn.Module):
    """Rows of a batch, tokens flattened into them, as mixture-of-experts layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x.flatten(0, 1))).unflatten(0, x.shape[:2]))


@pytest.mark.parametrize("value", [0.5, -2, True, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16)])
def test_set_coeff_to_a_number(value):
    model = operated("raw").model
    assert set_coeff(model, value) is model
    assert coefficients(model) == [float(value)] * 4


@pytest.mark.parametrize("value", [[0.5] * 5, torch.arange(5), torch.ones(5, requires_grad=True)])
def test_set_coeff_to_rows(value):
    model = operated("mlp").model
    set_coeff(model, value)
    assert coefficients(model) == [torch.as_tensor(value, dtype=torch.float32).tolist()] * 3
    assert not any(site.steering.coeff.requires_grad for site in sites(model).values())
    set_coeff(model, 1.0)
    assert coefficients(model) == [1.0] * 3


NONSENSE = (float("nan"), -float("inf"), torch.tensor([1, float("nan")]), torch.ones(2, 2, 2), torch.ones(0), 1e39)


@pytest.mark.parametrize("value", [*NONSENSE, "strong", None, 1j, [[1.0], [1.0, 2.0]]], ids=repr)
def test_set_coeff_refuses_and_changes_nothing(value):
    model = set_coeff(operated("mlp").model, 0.5)
    with pytest.raises(surgery.InputError, match="coeff"):
        set_coeff(model, value)
    assert coefficients(model) == [0.5] * 3


def test_a_tensor_of_coefficients_stays_the_callers():
    model = operated("mlp").model.double()
    rows = torch.ones(5, dtype=torch.float64)
    set_coeff(set_coeff(model, rows), torch.zeros(5))
    assert torch.equal(rows, torch.ones(5, dtype=torch.float64))
    held = {site.steering.coeff.data_ptr() for site in sites(model).values()}
    assert len(held) == 1
    assert rows.data_ptr() not in held


@pytest.mark.parametrize("name", CALLED)
def test_every_row_has_its_own_coeff(name):
    found = operated(name)
    rows = torch.linspace(-1, 1.5, len(found.run()))
    together = found.run(set_coeff(found.model, rows))
    for i, coeff in enumerate(rows):
        assert_close(together[i], found.run(set_coeff(found.model, coeff))[i])


def test_rows_that_are_flattened_with_their_tokens():
    found = operate(SmallModel("flattening", Flattening().eval(), torch.randn(3, 5, 6)), r=4)
    with torch.no_grad():
        for site in sites(found.model).values():
            site.core.g.fill_(0.8)
    together = found.run(set_coeff(found.model, torch.tensor([0.0, 1.0, -1.0])))
    for i, coeff in enumerate((0.0, 1.0, -1.0)):
        assert_close(together[i], found.run(set_coeff(found.model, coeff))[i])


def test_rows_that_do_not_fit_the_batch():
    found = operated("mlp")
    set_coeff(found.model, torch.ones(3))
    with pytest.raises(surgery.InputError, match=r"coeff has 3 rows.*batch of 5"):
        found.run()


@pytest.mark.parametrize("name", ["attention", "encoder_layer", "raw"])
def test_rows_are_refused_where_a_weight_is_read(name):
    model = operated(name).model
    with pytest.raises(surgery.InputError, match=r"is read as a weight.*exclude_modules"):
        set_coeff(model, torch.ones(2))
    assert set(coefficients(model)) == {1.0}


@pytest.mark.parametrize("inside", [0.0, torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])])
@pytest.mark.parametrize("before", [0.3, [0.1, 0.2, 0.3, 0.4, 0.5]])
def test_steer_puts_back_what_was_there(before, inside):
    found = operated("mlp")
    set_coeff(found.model, before)
    output, expected = found.run(), coefficients(found.model)
    with steer(found.model, inside) as model:
        assert model is found.model
        assert coefficients(model) == [torch.as_tensor(inside).tolist()] * 3
        assert not torch.equal(found.run(), output)
    assert coefficients(found.model) == expected
    assert torch.equal(found.run(), output)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_steer_restores_after_an_exception(error):
    model = operated("mlp").model
    with pytest.raises(error), steer(model, 0.0), steer(model, torch.ones(5)):
        raise error
    with pytest.raises(surgery.InputError), steer(model, float("nan")):
        pass
    assert coefficients(model) == [1.0] * 3


def test_steering_in_inference_mode_leaves_a_model_that_trains():
    found = operated("mlp")
    with torch.inference_mode(), steer(found.model, torch.zeros(5)):
        found.run()
    found.forward().sum().backward()
    with torch.inference_mode():
        set_coeff(found.model, torch.ones(5))
    found.forward().sum().backward()


def test_steer_leaves_sites_alone_that_are_new_inside():
    found = operate(small_model("mlp"), target_modules=["0"])
    with steer(found.model, 0.5):
        operate(found, target_modules=["2"])
    assert coefficients(found.model) == [1.0, 1.0]


@pytest.mark.parametrize("verb", [undo_surgery, merge])
def test_steer_outlives_the_end_of_surgery_inside(verb):
    model = operated("mlp").model
    with steer(model, 0.5):
        verb(model)
    assert sites(model) == {}


@each_dtype
@each_model
def test_merged_weights_are_rounded_once(name, dtype):
    found = operated(name, dtype)
    set_coeff(found.model, 0.75)
    expected, bases = reference(found, dtype, 0.75), dict(small_model(name, dtype).model.named_parameters())
    merge(found.model)
    changed = 0
    for key, parameter in expected.named_parameters():
        merged = found.model.get_parameter(key)
        assert merged.dtype == dtype
        assert torch.equal(merged, parameter.to(dtype))
        changed += not torch.equal(merged, bases[key])
    assert changed == len(sites(operated(name, dtype).model))


@each_dtype
@each_model
def test_merged_outputs_are_the_live_ones(name, dtype):
    found = operated(name, dtype)
    live = found.run()
    assert merge(found.model) is found.model
    assert_close(found.run(), live)
    assert relative_error(small_model(name, dtype).run(), live) > 2 * RELATIVE[dtype]


@each_model
def test_a_merged_model_is_plain(name):
    found, base = operated(name), small_model(name).model
    merge(found.model)
    flags, expected = ([(n, p.requires_grad) for n, p in m.named_parameters()] for m in (found.model, base))
    assert flags == expected
    assert [type(m) for m in found.model.modules()] == [type(m) for m in base.modules()]
    assert list(found.model.state_dict()) == list(base.state_dict())
    assert sites(found.model) == {}
    assert "_surgery" not in vars(found.model)
    assert not any(parametrize.is_parametrized(module) for module in found.model.modules())


@each_model
def test_merge_leaves_the_base_tensors_unwritten(name):
    found = operated(name)
    weights = [(site.weight, site.weight.detach().clone()) for site in sites(found.model).values()]
    merge(found.model)
    assert all(torch.equal(weight, before) for weight, before in weights)


def test_merge_at_coeff_zero_is_the_base():
    found = operated("raw")
    merge(set_coeff(found.model, 0.0))
    assert torch.equal(found.run(), small_model("raw").run())


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "t5"])
def test_merge_refuses_a_tied_weight_or_unties_it(name, tmp_path):
    found = operate(small_model(name), target_modules=["lm_head"])
    embedding = found.model.get_input_embeddings().weight
    with torch.no_grad():
        sites(found.model)["lm_head"].core.g.fill_(0.5)
    live, before = found.run(), state_of(found.model)
    with pytest.raises(surgery.WeightError, match=r"'lm_head' shares its weight with .*(embed|wte|shared).*untie=True"):
        merge(found.model)
    assert state_of(found.model) == before
    merge(found.model, untie=True)
    assert found.model.get_input_embeddings().weight is embedding
    assert found.model.get_output_embeddings().weight is not embedding
    assert_close(found.run(), live)
    found.model.save_pretrained(tmp_path)
    assert torch.equal(found.run(type(found.model).from_pretrained(tmp_path).eval()), found.run())


def test_merge_refuses_rows_and_overflow_and_changes_nothing():
    for dtype, change, match in [(torch.float32, 0.0, "rows"), (torch.float16, 1e7, "overflows torch.float16")]:
        model = operated("mlp", dtype).model
        with torch.no_grad():
            sites(model)["2"].core.g.add_(change)
        set_coeff(model, torch.ones(5) if not change else 1.0)
        before = state_of(model)
        with pytest.raises(surgery.InputError, match=match):
            merge(model)
        assert state_of(model) == before


def test_trainable_parameters_are_printed_as_peft_does(capsys):
    model = operated("qwen3").model
    surgery.print_trainable_parameters(model)
    ours = capsys.readouterr().out
    counted = [(p.numel(), p.requires_grad) for p in model.parameters()]
    numbers = sum(n for n, trainable in counted if trainable), sum(n for n, _ in counted)
    PeftModel.print_trainable_parameters(SimpleNamespace(get_nb_trainable_parameters=lambda: numbers))
    assert ours == capsys.readouterr().out
    assert numbers == (14 * 16, sum(p.numel() for p in small_model("qwen3").model.parameters()) + 14 * 16)


def test_a_peft_model_is_counted_as_peft_counts_it(capsys):
    model = get_peft_model(small_model("llama").model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.print_trainable_parameters()
    expected = capsys.readouterr().out
    surgery.print_trainable_parameters(model)
    assert capsys.readouterr().out == expected


@each_model
def test_a_plain_model_has_no_sites(name):
    assert sites(small_model(name).model) == {}


@pytest.mark.parametrize("verb", MODEL_VERBS)
def test_verbs_refuse_a_plain_model(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small_model("mlp").model
    with pytest.raises(surgery.SurgeryError, match="Sequential carries no surgery: call apply_surgery or load_adapter"):
        MODEL_VERBS[verb](model)
    undone = undo_surgery(operate(small_model("mlp")).model)
    with pytest.raises(surgery.SurgeryError, match="carries no surgery"):
        MODEL_VERBS[verb](undone)
    assert list(tmp_path.iterdir()) == []
