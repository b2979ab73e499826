"""``torch.compile``: one graph, no recompilation for new values, and never another model's code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

import surgery
from surgery import load_adapter, merge, report, save_adapter, set_coeff, sites, steer, undo_surgery
from tests.support.operated_models import operate, operated, randomise
from tests.support.tolerance import RELATIVE, assert_close, relative_error
from tests.support.zoo import small_model

compiled_models = pytest.mark.parametrize("name", ["mlp", "qwen3", "raw"])


def compiled(model: nn.Module, backend: Any = "eager") -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


def set_gains(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for site in sites(model).values():
            site.core.g.fill_(value)


@pytest.mark.parametrize("name", ["mlp", "gpt2", "raw"])
def test_compiled_equals_eager(name):
    found = operated(name)
    output = found.run()
    assert_close(found.run(compiled(found.model)), output)
    assert relative_error(output, small_model(name).run()) > 2 * RELATIVE[torch.float32]


@pytest.mark.parametrize("name", ["mlp", pytest.param("qwen3", marks=pytest.mark.full)])
def test_compiled_by_inductor_equals_eager(name):
    found = operated(name)
    assert_close(found.run(compiled(found.model, "inductor")), found.run())


@compiled_models
def test_values_of_coeff_and_core_do_not_recompile(name):
    found, counter = operated(name), CompileCounter()
    model = compiled(found.model, counter)
    found.run(model)
    assert counter.frame_count == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for coeff in (0.5, -1.0, 0, torch.tensor(2.0)):
            set_coeff(model, coeff)
            assert_close(found.run(model), found.run())
        set_gains(found.model, 0.3)
        assert_close(found.run(model), found.run())
        for site in sites(model).values():
            site.core.g.data = torch.full_like(site.core.g, -0.4)
        assert_close(found.run(model), found.run())
        with steer(model, 0.0):
            assert_close(found.run(model), small_model(name).run())
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["mlp", pytest.param("qwen3", marks=pytest.mark.full)])
def test_rows_recompile_once(name):
    found, counter = operated(name), CompileCounter()
    model, batch = compiled(found.model, counter), len(found.run())
    found.run(model)
    for rows in (torch.linspace(0, 1, batch), torch.linspace(-1, 2, batch), torch.zeros(batch)):
        set_coeff(model, rows)
        assert_close(found.run(model), found.run())
    set_coeff(model, 1.0)
    assert_close(found.run(model), found.run())
    assert counter.frame_count <= 2


@pytest.mark.parametrize("base_first", [True, False])
@compiled_models
def test_base_and_operated_model_of_one_class_compiled_in_one_process(name, base_first):
    base, found = small_model(name), operated(name)
    outputs = {id(base): base.run(), id(found): found.run()}
    models = {}
    for each in (base, found) if base_first else (found, base):
        models[id(each)] = compiled(each.model)
        assert_close(each.run(models[id(each)]), outputs[id(each)])
    for each in (base, found, base):
        assert_close(each.run(models[id(each)]), outputs[id(each)])
    assert relative_error(outputs[id(base)], outputs[id(found)]) > 2 * RELATIVE[torch.float32]


@pytest.mark.parametrize(("name", "in_place"), [("mlp", False), ("raw", False), ("raw", True)])
def test_surgery_and_undo_after_compiling(name, in_place):
    found = small_model(name)
    base = found.run()
    if in_place:
        found.model.compile(fullgraph=True, backend="eager")
    model = found.model if in_place else compiled(found.model)
    assert_close(found.run(model), base)
    randomise(operate(found).model)
    assert report(found.model).captured
    live = found.run(model)
    assert_close(live, operated(name).run())
    undo_surgery(model)
    assert_close(found.run(model), base)
    randomise(operate(found).model)
    merge(model)
    assert_close(found.run(model), live)


@pytest.mark.parametrize("name", ["mlp", "raw"])
def test_compiled_training_is_eager_training(name):
    eager, found, losses = operated(name, scale=0.0), operated(name, scale=0.0), {}
    target = torch.randn_like(eager.run())
    for each, model in ((eager, eager.model), (found, compiled(found.model, "aot_eager"))):
        optimiser = torch.optim.SGD([p for p in each.model.parameters() if p.requires_grad], lr=0.1)
        losses[id(each)] = []
        for _ in range(3):
            loss = F.mse_loss(each.forward(model), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[id(each)].append(loss.detach())
    assert losses[id(found)][-1] < losses[id(found)][0]
    assert_close(torch.stack(losses[id(found)]), torch.stack(losses[id(eager)]))
    for key, site in sites(found.model).items():
        assert_close(site.core.g.detach(), sites(eager.model)[key].core.g.detach())


@pytest.mark.parametrize("name", ["attention", "encoder_layer"])
def test_weights_that_are_read_compile_too(name):
    found = operated(name)
    output = found.run()
    assert_close(found.run(torch.compile(found.model, backend="eager")), output)
    undo_surgery(found.model)
    assert_close(found.run(torch.compile(found.model, backend="eager")), small_model(name).run())


def test_verbs_see_through_the_wrapper_of_torch_compile(tmp_path, capsys):
    found = small_model("mlp")
    base = found.run()
    wrapper = torch.compile(found.model, backend="eager")
    assert surgery.apply_surgery(wrapper, "antipasto", r=4, progress=False) is wrapper
    set_gains(wrapper, 0.5)
    live = found.run()
    assert sites(wrapper) == sites(found.model) != {}
    assert set_coeff(wrapper, 0.0) is wrapper
    assert {float(s.steering.coeff) for s in sites(found.model).values()} == {0.0}
    with steer(wrapper, 2.0) as steered:
        assert steered is wrapper
        assert {float(s.steering.coeff) for s in sites(found.model).values()} == {2.0}
    assert report(wrapper) == report(found.model)
    assert report(wrapper).model == "Sequential"
    assert surgery.inspect_sites(wrapper) == surgery.inspect_sites(found.model)
    surgery.print_trainable_parameters(wrapper)
    assert "trainable params: 12 " in capsys.readouterr().out
    save_adapter(wrapper, tmp_path / "adapter")
    assert undo_surgery(wrapper) is wrapper
    assert torch.equal(found.run(), base)
    assert load_adapter(wrapper, tmp_path / "adapter") is wrapper
    assert torch.equal(found.run(), live)
    assert surgery.refresh(wrapper) is wrapper
    assert merge(wrapper) is wrapper
    assert sites(wrapper) == {}
    assert_close(found.run(), live)
