"""Graph modules of every dialect go through one contract: the in-place model's function, undo, merge, files."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import surgery
from surgery import apply_surgery, load_adapter, merge, report, save_adapter, set_coeff, sites, steer, undo_surgery
from surgery.modules.adapter import Adapter
from tests.support.operated_graphs import (
    DIALECTS,
    HUB_MODELS,
    base,
    each_graph,
    graph,
    graph_state,
    in_place,
    operate,
    operated,
    shape_of,
    source,
)
from tests.support.operated_models import randomise
from tests.support.tolerance import RELATIVE, assert_close, relative_error
from tests.support.zoo import SmallModel

NAMED = ("symbolic", "exported", "program", "traced", "scripted")  # Dynamo gives parameters names of its own
each_dialect = pytest.mark.parametrize("name", [*DIALECTS, *HUB_MODELS])
each_named = pytest.mark.parametrize("name", [*NAMED, *HUB_MODELS])


@each_dialect
def test_sites_of_a_graph(name):
    found = operate(graph(name))
    assert isinstance(found.model, fx.GraphModule)
    expected = {"qwen3": 14, "gpt2": 8, "bert": 14}.get(name, 7)
    assert len(sites(found.model)) == expected
    assert all(isinstance(site, surgery.Adapter) for site in sites(found.model).values())
    if name in NAMED:
        assert set(sites(found.model)) == {"w", "v", "a", "m", "twice", "block.0", "block.2"}


@each_dialect
def test_identity_bit_for_bit(name):
    plain, found = base(name), operate(graph(name))
    assert torch.equal(found.forward().detach(), plain.forward())
    assert torch.equal(found.run(), plain.run())
    set_coeff(randomise(found.model), 0.0)
    assert torch.equal(found.run(), plain.run())
    set_coeff(found.model, 1.0)
    assert relative_error(found.run(), plain.run()) > 2 * RELATIVE[torch.float32]


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["symbolic", "exported", HUB_MODELS[0]])
def test_other_dtypes(name, dtype):
    plain, found, eager = base(name, dtype), operate(graph(name, dtype)), in_place(name, dtype)
    assert torch.equal(found.run(), plain.run())
    randomise(found.model)
    for key, site in sites(eager.model).items():
        site.core.load_state_dict(sites(found.model)[key].core.state_dict())
    output = found.run()
    assert output.dtype == dtype
    assert_close(output, eager.run())
    assert relative_error(output, plain.run()) > 2 * RELATIVE[dtype]
    merge(found.model)
    assert_close(found.run(), output)


@each_named
def test_adapters_go_from_graph_to_module_and_back(name, tmp_path):
    found, eager = operated(name), source(name)
    save_adapter(found.model, tmp_path / "one")
    load_adapter(eager.model, tmp_path / "one")
    assert_close(found.run(), eager.run())
    save_adapter(eager.model, tmp_path / "two")
    again = base(name)
    assert load_adapter(again.model, tmp_path / "two") is again.model
    assert torch.equal(again.run(), found.run())
    assert all(isinstance(site, Adapter) for site in sites(again.model).values())


def test_an_adapter_file_is_loaded_into_an_exported_program(tmp_path):
    found, program = operated("exported"), graph("program")
    save_adapter(found.model, tmp_path)
    loaded = load_adapter(program.model, tmp_path)
    assert torch.equal(program.run(loaded), found.run())


@each_dialect
def test_files_keep_a_graph_exactly(name, tmp_path):
    found, fresh = operated(name), base(name)
    fresh.model.requires_grad_(True)
    before = graph_state(fresh.model)
    save_adapter(found.model, tmp_path / "a")
    set_coeff(found.model, 0.5)
    load_adapter(fresh.model, tmp_path / "a")
    assert torch.equal(fresh.run(), found.run(set_coeff(found.model, 1.0)))
    save_adapter(fresh.model, tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    randomise(fresh.model, 0.1)
    load_adapter(fresh.model, tmp_path / "b")  # in place of what it carries
    assert torch.equal(fresh.run(), found.run())
    undo_surgery(fresh.model)
    assert graph_state(fresh.model) == before


@each_dialect
def test_only_cores_train_and_all_of_them_as_in_place(name):
    found, eager = operated(name, torch.float64), in_place(name, torch.float64)
    gradients = []
    others = sites(eager.model).values()  # by their weights, since Dynamo gives names of its own
    pairs = [(s, next(o for o in others if torch.equal(o.weight, s.weight))) for s in sites(found.model).values()]
    for one, other in pairs:
        other.core.load_state_dict(one.core.state_dict())
    for each in (found, eager):
        (each.forward() - 1).square().mean().backward()
    cores = {id(p) for site in sites(found.model).values() for p in site.core.parameters()}
    assert {id(p) for p in found.model.parameters() if p.requires_grad} == cores
    for one, other in pairs:
        assert_close(one.core.g.grad, other.core.g.grad, torch.float64)
        gradients.append(one.core.g.grad.abs().max())
    assert min(gradients) > 0


@each_dialect
def test_rows_of_a_graph(name):
    found = operated(name)
    rows = torch.linspace(-1, 1.5, len(found.run()))
    together = found.run(set_coeff(found.model, rows))
    for i, coeff in enumerate(rows):
        with steer(found.model, float(coeff)):
            assert_close(together[i], found.run()[i])
    assert torch.equal(found.run(), together)
    assert relative_error(together[0], found.run(set_coeff(found.model, 1.0))[0]) > 2 * RELATIVE[torch.float32]


@each_graph
def test_rows_that_do_not_divide_the_batch_of_a_graph(name):
    found = operated(name)
    set_coeff(found.model, torch.ones(3))
    with pytest.raises(surgery.InputError, match="coeff has 3 rows"):
        found.run()


@each_dialect
def test_steering_a_graph_puts_back(name):
    found = operated(name)
    before = found.run()
    with steer(found.model, 0.25):
        assert relative_error(found.run(), before) > 2 * RELATIVE[torch.float32]
    assert torch.equal(found.run(), before)


@each_dialect
def test_report_of_a_graph(name):
    found = operated(name)
    result = report(found.model)
    assert result.captured
    assert [site.key for site in result.sites] == list(sites(found.model))
    for site, node in zip(result.sites, sites(found.model).values(), strict=True):
        r, d_in = node.factors.Vh.shape
        d_out = len(node.factors.U)
        assert (site.d_out, site.d_in, site.r, site.trainable) == (d_out, d_in, r, r)
        assert (site.host, site.lowering, site.macs) == ("graph", "lowrank", r * (d_in + d_out))
    assert f"{len(result.sites)} sites operated on" in str(result)
    assert result.trainable == sum(site.r for site in result.sites)


@each_dialect
def test_merged_graph_is_the_base_with_other_weights(name):
    found, plain = operated(name), base(name)
    live, weights = found.run(), {site.weight_name: site.merged_weight() for site in sites(found.model).values()}
    assert merge(found.model) is found.model
    assert shape_of(found.model.graph) == shape_of(plain.model.graph)
    assert [str(n.target) for n in found.model.graph.nodes] == [str(n.target) for n in plain.model.graph.nodes]
    assert list(found.model.state_dict()) == list(plain.model.state_dict())
    assert sites(found.model) == {}
    assert not hasattr(found.model, "sspace")
    assert_close(found.run(), live)
    for key, parameter in plain.model.named_parameters():
        expected = weights.get(key, parameter)
        assert torch.equal(found.model.get_parameter(key), expected)
    with pytest.raises(surgery.SurgeryError):
        undo_surgery(found.model)


@each_named
def test_merged_graph_holds_the_weights_of_the_merged_module(name, tmp_path):
    found, eager = operated(name), source(name)
    load_adapter(eager.model, save_adapter(found.model, tmp_path))
    merge(set_coeff(found.model, 0.7))
    merge(set_coeff(eager.model, 0.7))
    for key, parameter in eager.model.named_parameters():
        assert torch.equal(found.model.get_parameter(key), parameter), key


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_a_symbolic_graph_at_other_batches(rows):
    found, eager = operated("symbolic"), in_place("symbolic")
    for key, site in sites(eager.model).items():
        site.core.load_state_dict(sites(found.model)[key].core.state_dict())
    x = torch.randn(rows, 12)
    assert_close(found.run(inputs=x), eager.run(inputs=x))


def test_a_symbolic_graph_on_single_vectors_and_sequences():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    found = operate(SmallModel("vector", fx.symbolic_trace(model), torch.randn(6)), example_inputs=None)
    randomise(found.model)
    x = torch.randn(2, 4, 5, 6)
    together = found.run(inputs=x)
    assert_close(together[1, 3, 2], found.run(inputs=x[1, 3, 2]))
    assert_close(together[0], found.run(inputs=x[0]))


def test_torchscript_needs_example_inputs():
    with pytest.raises(surgery.CaptureError, match="example_inputs"):
        apply_surgery(graph("scripted").model, "antipasto", progress=False)


@pytest.mark.parametrize("name", ["program", "traced", "scripted"])
def test_what_is_converted_stays_as_it_was(name):
    found = graph(name)
    inner = found.model.module() if name == "program" else found.model
    before = [(n, id(p), p.requires_grad, p.detach().clone()) for n, p in inner.named_parameters()]
    output = found.run(inner)
    merge(randomise(operate(found).model))
    after = list((found.model.module() if name == "program" else found.model).named_parameters())
    for (key, identity, flag, value), (key_, parameter) in zip(before, after, strict=True):
        assert (key, flag) == (key_, parameter.requires_grad)
        assert torch.equal(value, parameter)
        assert name == "scripted" or identity == id(parameter)
    assert torch.equal(found.run(inner), output)
