"""One model, one function: factors stay those of the weight that is there, in train and in eval alike."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import apply_surgery, load_adapter, merge, recalibrate, refresh, save_adapter, sites, undo_surgery
from tests.support.lowering_models import inputs, model_of, operated, reference, shake
from tests.support.tolerance import assert_close

LOWERINGS = ["auto", "lowrank", "output", "pair", "dense"]


def another_base(seed: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = {name: torch.randn_like(tensor) for name, tensor in model_of().state_dict().items()}
    return state


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(inputs())
    return found


WRITES: dict[str, Callable[[nn.Module, dict[str, torch.Tensor]], Any]] = {
    "copied": lambda m, state: m.load_state_dict(state, strict=False),
    "assigned": lambda m, state: m.load_state_dict(state, strict=False, assign=True),
    "in place": lambda m, state: [m.get_parameter(n).detach().copy_(t) for n, t in state.items()],
    "new parameter": lambda m, state: [
        setattr(m.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2], nn.Parameter(t, requires_grad=False))
        for n, t in state.items()
    ],
    "new memory": lambda m, state: [setattr(m.get_parameter(n), "data", t) for n, t in state.items()],
    "data": lambda m, state: refresh([m.get_parameter(n).data.copy_(t) for n, t in state.items()] and m),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_another_base_is_refused_at_the_next_call(lowering: str, write: str) -> None:
    model = operated(lowering)
    base, live = {n: t.clone() for n, t in model_of().state_dict().items()}, run(model)
    WRITES[write](model, another_base())
    for call in (lambda: run(model), lambda: model.train()(inputs()), lambda: merge(model)):
        with pytest.raises(surgery.SurgeryError, match=r"site '0': its base weight is not the one .* undo_surgery"):
            call()
    WRITES[write](model.eval(), base)
    assert torch.equal(run(model), live), "the weight that was there is taken again"


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_equal_values_are_adopted(lowering: str, write: str) -> None:
    model = operated(lowering)
    live = run(model)
    WRITES[write](model, {n: t.clone() for n, t in model_of().state_dict().items()})
    assert torch.equal(run(model), live)
    assert torch.equal(run(model), live)
    assert_close(run(merge(model)), live)


def test_a_file_of_another_base_is_not_written_and_the_ways_out_work(tmp_path: Any) -> None:
    model = operated("auto")
    model.load_state_dict(another_base(), strict=False)
    with pytest.raises(surgery.SurgeryError, match="its base weight is not the one"):
        save_adapter(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    new = copy.deepcopy(model)
    recalibrate(new, [inputs()], reset=True, progress=False)
    expected = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16))
    expected.load_state_dict(another_base())
    assert torch.equal(run(new), run(expected))
    assert_close(run(shake(new)), reference(new, inputs()))
    undo_surgery(model)
    assert torch.equal(run(model), run(expected))
    apply_surgery(model, "antipasto", r=8, example_inputs=inputs(), progress=False)
    assert torch.equal(run(model), run(expected))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_the_state_of_another_operated_model_is_adopted_whole_and_refused_in_parts(lowering: str) -> None:
    model, other = operated(lowering), nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16))
    other.load_state_dict(another_base())
    apply_surgery(other, "antipasto", r=8, target_modules="all-linear", example_inputs=inputs(), progress=False)
    shake(other, seed=9)
    state = other.state_dict()
    part = copy.deepcopy(model)
    part.load_state_dict({n: t for n, t in state.items() if ".factors." in n}, strict=False)
    with pytest.raises(surgery.SurgeryError, match="its base weight is not the one that its factors were made for"):
        run(part)
    model.load_state_dict(state)
    assert_close(run(model), reference(other, inputs()))
    assert_close(run(merge(model)), reference(other, inputs()))


@pytest.mark.parametrize("optimiser", ["sgd", "fused"])
def test_a_weight_that_is_trained_beside_the_adapter_keeps_the_low_rank_form(optimiser: str, tmp_path: Any) -> None:
    model = operated("auto")
    for site in sites(model).values():
        site.weight.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = {"sgd": torch.optim.SGD(parameters, lr=0.05), "fused": torch.optim.AdamW(parameters, lr=0.05, fused=True)}
    factors = [site.factors.U.clone() for site in sites(model).values()]
    for _ in range(3):
        steps[optimiser].zero_grad()
        model(inputs()).square().sum().backward()
        steps[optimiser].step()
        assert_close(run(model), reference(model, inputs()))
    for site in sites(model).values():
        site.weight.requires_grad_(False)
    expected = reference(model, inputs())
    assert_close(run(model), expected)
    assert_close(model(inputs()), expected)
    assert all(torch.equal(a, s.factors.U) for a, s in zip(factors, sites(model).values(), strict=True))
    assert all(site.record.trained for site in sites(model).values())
    assert all(site.chosen(torch.zeros(1, site.features[0])) == "lowrank" for site in sites(model).values())
    one = pickle.loads(pickle.dumps(model))
    assert_close(run(one), expected)
    model.load_state_dict(another_base(), strict=False)
    with pytest.raises(surgery.SurgeryError, match="its base weight is not the one"):
        run(model)
    assert_close(run(merge(one)), expected)


@pytest.mark.parametrize("write", WRITES)
def test_copies_know_their_weight(write: str) -> None:
    model = operated("auto")
    expected = run(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    WRITES[write](model, another_base())
    copies.append(copy.deepcopy(model))
    copies.append(copy.deepcopy(copies[0]))
    WRITES[write](copies[3], another_base())
    copies.append(copy.deepcopy(copies[0]))
    WRITES[write](copies[4], another_base())
    copies[4].to(torch.bfloat16).to(torch.float32)
    for one in copies[:2]:
        assert torch.equal(run(one), expected)
        WRITES[write](one, another_base())
    for one in copies:
        with pytest.raises(surgery.SurgeryError, match="its base weight is not the one"):
            run(one)


@pytest.mark.parametrize("form", ["delta", "residual"])
@pytest.mark.parametrize("convert", ["half", "double", "to"])
def test_a_conversion_is_not_another_base_and_one_that_is_loaded_after_it_is(form: str, convert: str) -> None:
    def made() -> nn.Module:
        model = apply_surgery(
            model_of(),
            "antipasto",
            r=8,
            target_modules="all-linear",
            form=form,
            example_inputs=inputs(),
            progress=False,
        )
        return shake(model)

    change = {"half": lambda m: m.bfloat16(), "double": lambda m: m.double(), "to": lambda m: m.to("cpu")}[convert]
    model = change(made())
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        model(inputs().to(dtype))
    if form == "residual":
        return  # whose state holds the remainder, and no weight
    for moment in ("before", "after"):
        model = made()
        for step in (change, WRITES["copied"]) if moment == "before" else (WRITES["copied"], change):
            step(model, another_base()) if step is WRITES["copied"] else step(model)
        with pytest.raises(surgery.SurgeryError, match="its base weight is not the one"), torch.no_grad():
            model(inputs().to(dtype))


def test_parameters_that_were_given_other_memory_are_seen() -> None:
    model = operated("dense")
    before = run(model)
    vector = nn.utils.parameters_to_vector(model.parameters())
    for k in range(4):  # memory that was given back may be given out again
        nn.utils.vector_to_parameters(vector.clone(), model.parameters())
        for site in sites(model).values():
            assert site.core.g._version == site.core.g._version
        assert torch.equal(run(model), before)
        cores = [site.core.g for site in sites(model).values()]
        moved = nn.utils.parameters_to_vector(cores) + 0.1 * (k + 1)
        nn.utils.vector_to_parameters(moved, cores)
        assert_close(run(model), reference(model, inputs()))


@pytest.mark.parametrize("host", ["weight", "packed"])
def test_a_weight_that_is_read_is_compared_too(host: str) -> None:
    from tests.support.base_weight_models import input_of
    from tests.support.base_weight_models import model_of as kind_of

    kind = {"weight": "conv1d", "packed": "packed"}[host]
    model = kind_of(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_surgery(model, "antipasto", r=4, target_modules="all-linear", example_inputs=input_of(kind), progress=False)
    with torch.no_grad():
        live = shake(model)(input_of(kind))
        owner = next(iter(sites(model).values())).host
        owner.parameter().copy_(owner.parameter().clone())
        assert torch.equal(model(input_of(kind)), live)
        model.to(torch.float64).to(torch.float32)
        assert_close(model(input_of(kind)), live)
        owner.parameter().add_(1.0)
        with pytest.raises(surgery.SurgeryError, match="its base weight is not the one"):
            model(input_of(kind))
    assert state


def test_a_root_that_was_loaded_is_compared_too(tmp_path: Any) -> None:
    save_adapter(operated("auto"), tmp_path)
    model = load_adapter(model_of(), tmp_path, progress=False)
    model.load_state_dict(another_base(), strict=False)
    with pytest.raises(surgery.SurgeryError, match="its base weight is not the one"):
        run(model)
