"""Graph modules: inputs, weights and modes that a capture easily gets wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import surgery
from passes.ir.forward_context import set_mode
from surgery import apply_surgery, fold, load_adapter, merge, save_adapter, sites, to_graph
from tests.support.operated_models import randomise
from tests.support.tolerance import assert_close
from tests.support.zoo import Forward, small_model


def operate(model: nn.Module, inputs, **options) -> nn.Module:
    set_mode(model, training=False)
    return randomise(apply_surgery(model, "antipasto", r=3, example_inputs=inputs, progress=False, **options))


class Two(nn.Module):
    """Two inputs, a linear called by keyword, and a scalar flag."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return self.lin(input=x) + scale * y


def test_one_tensor_given_twice_stays_two_inputs():
    x, model = torch.randn(3, 6), Two()
    operate(model, (x, x))
    graph = to_graph(model, (x, x), verify=True)
    a, b = torch.randn(5, 6), torch.randn(5, 6)
    with torch.no_grad():
        assert_close(graph(a, b), model(a, b))
        assert_close(graph(x, x), model(x, x))


def test_attention_with_one_input_is_captured_for_three():
    found = small_model("attention")
    operate(found.model, found.inputs)
    graph = to_graph(found.model, found.inputs, verify=True)
    apart = tuple(torch.randn(2, 5, 16) for _ in range(3))
    assert_close(found.run(graph, apart), found.run(inputs=apart))
    assert_close(found.run(graph), found.run())


def test_a_weight_that_is_cast_is_left_alone_in_a_graph_and_read_as_a_weight_otherwise():
    def forward(m, x):
        return m.lin(F.linear(x.double(), m.w.double()).float())

    made = lambda: Forward(forward, w=nn.Parameter(torch.randn(6, 6)), lin=nn.Linear(6, 6))  # noqa: E731
    x, model = torch.randn(3, 6), made()
    graph = torch.export.export(model, (x,), strict=False).module()
    operate(graph, x)
    assert set(sites(graph)) == {"lin"}
    reasons = {skip.where: skip.reason for skip in surgery.report(graph).skipped}
    assert "cast before the product" in reasons["w"]
    assert graph(x).isfinite().all()
    operate(model, x)
    assert set(sites(model)) == {"w", "lin"}
    assert_close(to_graph(model, x, verify=True)(x), model(x))


def test_labels_and_flags_do_not_reach_the_graph():
    found = small_model("llama")
    operate(found.model, found.inputs)
    batch = {**found.inputs, "labels": found.inputs["input_ids"], "use_cache": False}
    graph = to_graph(found.model, batch, form="residual", verify=True)
    fold(graph, verify=batch)
    merge(graph, verify=batch)
    assert_close(found.run(graph), found.run())
    with pytest.raises(surgery.InputError, match="does not take the inputs"):
        merge(to_graph(found.model, batch), verify=(1, 2, 3, 4))


def test_a_raw_parameter_with_another_reader_gets_a_weight_of_its_own():
    model = Forward(lambda m, x: x @ m.c.T + m.c.sum(), c=nn.Parameter(torch.randn(4, 6)))
    x = torch.randn(3, 6)
    graph = operate(fx.symbolic_trace(model), None, target_modules=["c"])
    live = graph(x).detach()
    with pytest.raises(surgery.WeightError, match="shares its weight with node"):
        merge(graph)
    merge(graph, untie=True)
    assert_close(graph(x), live)
    assert [name for name, _ in graph.named_parameters()] == ["c", "c_merged_1"]


@pytest.mark.parametrize("form", ["delta", "residual"])
def test_what_is_made_in_inference_mode_trains_afterwards(form):
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(3, 6)
    inner = nn.Sequential(nn.Linear(6, 4))
    with torch.inference_mode():
        graph = apply_surgery(fx.symbolic_trace(model), "antipasto", r=3, form=form, progress=False)
        other = to_graph(operate(inner, x), x, form=form)
    for each in (graph, other):
        each(x).square().sum().backward()
        assert all(site.core.g.grad is not None for site in sites(each).values())
    with torch.inference_mode():
        merge(fold(other))
    other.requires_grad_(True)
    other(x).sum().backward()
    assert all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 1, 6), (1, 1, 6)])
def test_a_size_of_one_in_the_example_stays_free(shape):
    model = operate(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(shape))
    graph = to_graph(model, torch.randn(shape), verify=True)
    for other in (shape, (5, 7, 6), (1, 2, 6), (2, 1, 6)):
        x = torch.randn(other)
        assert_close(graph(x), model(x))


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_one_token_in_the_example_of_a_language_model(name):
    found = small_model(name)
    operate(found.model, found.inputs)
    one = {"input_ids": torch.randint(0, 64, (2, 1))}
    graph = to_graph(found.model, one, verify=True)
    assert_close(found.run(graph, one), found.run(inputs=one))


def test_half_graphs_stay_half():
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(6, 8)).bfloat16())
    operate(graph, None)
    with pytest.raises(surgery.SurgeryError, match=r"from torch.bfloat16 to torch.float32"):
        graph.float()
    assert graph(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16


def test_dynamo_graphs_have_the_keys_of_their_model(tmp_path):
    x = torch.randn(3, 6)
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 4)).requires_grad_(False)
    graph = torch._dynamo.export(model)(x).graph_module
    operate(graph, x, target_modules=["0.0", "1"])
    assert list(sites(graph)) == ["0.0", "1"]
    save_adapter(graph, tmp_path / "a")
    load_adapter(model, tmp_path / "a")
    assert_close(model(x), graph(x))
    save_adapter(model, tmp_path / "b")
    again = load_adapter(surgery.undo_surgery(graph), tmp_path / "b")
    assert_close(again(x), model(x))


def test_a_graph_whose_parameters_are_inputs_says_how_to_capture_it():
    taken = []
    model, x = nn.Linear(6, 4), torch.randn(3, 6)
    torch.compile(model, backend=lambda graph, inputs: taken.append(graph) or graph)(x)
    with pytest.raises(surgery.TargetError, match="no parameters: they are among its inputs"):
        apply_surgery(taken[0], "antipasto", progress=False)


def test_an_adapter_loads_on_a_torchscript_module(tmp_path):
    x, model = torch.randn(3, 6), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).requires_grad_(False)
    script = torch.jit.trace(model, (x,))
    operate(model, x)
    save_adapter(model, tmp_path / "a")
    with pytest.raises(surgery.CaptureError, match="example_inputs"):
        load_adapter(script, tmp_path / "a")
    graph = load_adapter(script, tmp_path / "a", example_inputs=x)
    assert isinstance(graph, fx.GraphModule)
    assert_close(graph(x), model(x))
