"""``to_graph``: an operated model as one graph, in delta and residual form, with its core and with sizes free."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import fx, nn

import surgery
from passes.ir.provenance import provenance_of
from surgery import (
    apply_surgery,
    fold,
    load_adapter,
    merge,
    pipeline,
    report,
    save_adapter,
    set_coeff,
    sites,
    steer,
    to_graph,
    undo_surgery,
)
from surgery.hosting.state import record_of
from tests.support.graph_inputs import inputs_of
from tests.support.model_state import state_of
from tests.support.operated_graphs import graph_state, shape_of
from tests.support.operated_models import frozen, operate, operated, randomise
from tests.support.tolerance import RELATIVE, assert_close, relative_error
from tests.support.zoo import SmallModel, built_once, small_model

HUB = tuple(pytest.param(name, marks=pytest.mark.full) for name in ("gpt2", "qwen3"))
NAMES = ("mlp", "raw", "attention", "encoder_layer", *HUB)
WHOLE = ("mlp", "raw", *HUB)  # whose sites are all products
each_model = pytest.mark.parametrize("name", NAMES)
each_whole = pytest.mark.parametrize("name", WHOLE)
each_form = pytest.mark.parametrize("form", ["delta", "residual"])


@built_once
def _made(name: str, dtype: torch.dtype, form: str, keep_base: bool) -> tuple[SmallModel, fx.GraphModule]:
    found = operated(name, dtype)
    return found, to_graph(found.model, found.inputs, form=form, keep_base=keep_base)


def model_and_graph(
    name: str, dtype: torch.dtype = torch.float32, form: str = "delta", keep_base: bool = True
) -> tuple[SmallModel, fx.GraphModule]:
    """An operated model and its graph, which share their cores."""
    return _made(name, dtype, form, keep_base)


@each_form
@pytest.mark.parametrize("name", ["mlp", "raw", "attention", "encoder_layer", "gpt2", HUB[1]])
def test_a_graph_computes_what_the_model_does_at_any_size(name, form):
    found, model = model_and_graph(name, form=form)
    assert isinstance(model, fx.GraphModule)
    assert set(sites(model)) == set(sites(found.model))
    assert_close(found.run(model), found.run())
    for batch, length in ((1, 7), (5, 11)):
        inputs = inputs_of(name, batch, length)
        assert_close(found.run(model, inputs), found.run(inputs=inputs))
        with steer(found.model, -0.7), steer(model, -0.7):
            assert_close(found.run(model, inputs), found.run(inputs=inputs))


@each_model
def test_a_delta_graph_at_coeff_zero_is_the_captured_base(name):
    found, model = model_and_graph(name)
    plain = undo_surgery(copy.deepcopy(model)).requires_grad_(False)
    assert torch.equal(found.run(set_coeff(model, 0.0)), found.run(plain))
    assert_close(found.run(plain), frozen(name).run())


@each_form
@each_model
def test_the_model_stays_as_it_was(name, form):
    found = operated(name)
    set_coeff(found.model, 0.5)
    before, record, output = state_of(found.model), vars(found.model)["_surgery"], found.run()
    contents = copy.copy(vars(record))
    model = to_graph(found.model, found.inputs, form=form)
    assert state_of(found.model) == before
    assert vars(found.model)["_surgery"] is record
    assert vars(record) == contents
    merge(model)
    assert state_of(found.model) == before
    assert torch.equal(found.run(), output)


@each_form
@each_whole
def test_cores_are_the_models_and_coeff_the_graphs_own(name, form):
    found, model = model_and_graph(name, form=form)
    for key, site in sites(model).items():
        assert site.core.g is sites(found.model)[key].core.g
        assert site.steering.coeff is not sites(found.model)[key].steering.coeff
    before = found.run()
    set_coeff(model, 0.0)
    assert torch.equal(found.run(), before)
    set_coeff(model, 1.0)
    found.forward(model).square().mean().backward()
    assert all(site.core.g.grad.abs().max() > 0 for site in sites(found.model).values())
    randomise(found.model, 0.3)
    assert_close(found.run(model), found.run())
    assert relative_error(found.run(), before) > 2 * RELATIVE[torch.float32]
    cores = {id(site.core.g) for site in sites(model).values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == cores


@each_form
@each_whole
def test_rows_of_a_captured_graph(name, form):
    found, model = model_and_graph(name, form=form)
    rows = torch.linspace(-1, 1.5, len(found.run()))
    together = found.run(set_coeff(model, rows))
    for i, coeff in enumerate(rows):
        assert_close(together[i], found.run(set_coeff(found.model, coeff))[i])


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", *HUB])
def test_half_graphs(name, dtype, form):
    found, model = model_and_graph(name, dtype, form=form)
    output = found.run(model)
    assert output.dtype == dtype
    assert_close(output, found.run())
    assert relative_error(output, small_model(name, dtype).run()) > 2 * RELATIVE[dtype]
    if form == "residual":
        assert all(site.W_res.dtype == torch.float32 for site in sites(model).values())
    plain = undo_surgery(copy.deepcopy(model)).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_coeff(fold(model), 0.0)
    assert torch.equal(found.run(model), found.run(plain))


@each_form
@each_model
def test_undo_and_merge_of_a_captured_graph(name, form):
    found, model = model_and_graph(name, form=form)
    other, plain = copy.deepcopy(model), copy.deepcopy(small_model(name))
    assert_close(found.run(undo_surgery(model)), plain.run())
    weights, live = {key: site.merged_weight() for key, site in sites(other).items()}, found.run(other)
    names = {key: site.weight_name for key, site in sites(other).items()}
    merge(other)
    assert_close(found.run(other), live)
    assert sorted(shape_of(other.graph)) == sorted(shape_of(model.graph))
    assert list(other.state_dict()) == list(model.state_dict())
    assert not hasattr(other, "sspace")
    for key, weight in weights.items():
        assert torch.equal(other.get_parameter(names[key]), weight)
    flags = {n: p.requires_grad for n, p in plain.model.named_parameters()}
    assert all(p.requires_grad == flags[n] for n, p in other.named_parameters())
    assert all(p.requires_grad == flags[n] for n, p in model.named_parameters())


@each_whole
def test_a_folded_residual_graph_holds_the_stored_weights(name):
    found, model = model_and_graph(name, form="residual")
    bases = {site.weight_name: site.weight.clone() for site in sites(model).values()}
    plain = undo_surgery(copy.deepcopy(model)).requires_grad_(False)
    live = found.run(model)
    assert fold(model) is model
    assert_close(found.run(model), live)
    set_coeff(model, 0.0)
    assert torch.equal(found.run(model), found.run(plain))
    assert all(torch.equal(model.get_parameter(key), weight) for key, weight in bases.items())
    assert not any("W_res" in key for key in model.state_dict())
    undo_surgery(model)
    assert shape_of(model.graph) == shape_of(plain.graph)


@each_whole
def test_without_the_base(name, tmp_path):
    found, model = model_and_graph(name, form="residual", keep_base=False)
    assert_close(found.run(model), found.run())
    state = set(model.state_dict())
    before = graph_state(model)
    for key, site in sites(model).items():
        assert site.weight_name not in state
        original = small_model(name).model.get_parameter(site.weight_name).detach()
        off = float((site.weight.double() - original.double()).abs().max() / original.double().abs().max())
        assert site.base_error == pytest.approx(off, abs=1e-12)
        assert_close(site.weight, original, rounded=True)
        assert torch.equal(sites(found.model)[key].weight, original)
    with pytest.raises(surgery.SurgeryError, match="was not kept"):
        undo_surgery(model)
    assert graph_state(model) == before
    live = found.run(model)
    copied = fold(copy.deepcopy(model))
    for site in sites(copied).values():
        assert_close(copied.get_parameter(site.weight_name), small_model(name).model.get_parameter(site.weight_name))
    assert_close(found.run(copied), live)
    merge(copied)
    assert_close(found.run(copied), live)
    merge(model)
    assert_close(found.run(model), live)
    assert sites(model) == {}
    assert not {"sspace"} & set(dict(model.named_children()))


@pytest.mark.parametrize("name", ["mlp", "raw"])
def test_without_the_base_adapters_are_saved_and_loaded(name, tmp_path):
    found, model = model_and_graph(name, form="residual", keep_base=False)
    live = found.run(model)
    save_adapter(model, tmp_path)
    assert torch.equal(found.run(load_adapter(small_model(name).model, tmp_path)), found.run())
    randomise(model, 0.1)
    before, changed = graph_state(model), found.run(model)
    try:
        load_adapter(model, tmp_path)
    except surgery.SurgeryError:
        assert graph_state(model) == before
        assert torch.equal(found.run(model), changed)
    else:
        assert_close(found.run(model), live)


@pytest.mark.parametrize("name", ["mlp", "raw"])
def test_without_the_base_further_verbs_work_or_refuse(name):
    found, model = model_and_graph(name, form="residual", keep_base=False)
    before, live = graph_state(model), found.run(model)
    for verb in (to_graph, lambda m: apply_surgery(m, "antipasto", r=2, progress=False), undo_surgery):
        with pytest.raises(surgery.SurgeryError):
            verb(model)
        assert graph_state(model) == before
        assert torch.equal(found.run(model), live)
    folded = graph_state(fold(model))
    with pytest.raises(surgery.SurgeryError):
        undo_surgery(model)
    assert graph_state(model) == folded
    assert_close(found.run(model), live)


@pytest.mark.parametrize("name", ["mlp", "raw"])
def test_without_the_base_no_memory_of_it_is_kept(name):
    found = operated(name)
    model = to_graph(found.model, found.inputs, form="residual", keep_base=False)
    pointers = {site.weight.data_ptr() for site in sites(found.model).values()}
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.data_ptr() in pointers]
    own = {id(p) for p in found.model.parameters()}
    assert [tuple(t.shape) for t in alive if id(t) not in own] == []
    assert_close(found.run(model), found.run())


def test_without_the_base_of_one_module_under_two_names():
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model, x = nn.Sequential(inner, inner[0]), torch.randn(2, 4)
    apply_surgery(model, "antipasto", r=2, progress=False)
    graph = to_graph(model, x, form="residual", keep_base=False)
    assert not any(name.endswith("0.weight") for name, _ in graph.named_parameters())
    assert_close(graph(x), model(x))


@each_form
def test_residual_and_delta_graphs_of_a_graph_module(form, tmp_path):
    source = small_model("raw")
    found = operate(SmallModel("raw", fx.symbolic_trace(source.model), source.inputs))
    randomise(found.model)
    before, live, base = graph_state(found.model), found.run(), source.run()
    model = to_graph(found.model, form=form)
    assert model is not found.model
    assert_close(found.run(model), live)
    assert {site.form for site in sites(model).values()} == {form}
    assert graph_state(found.model) == before
    set_coeff(fold(model), 0.0)
    assert torch.equal(found.run(model), base)
    assert torch.equal(found.run(), live)
    merge(set_coeff(model, 1.0))
    assert_close(found.run(model), live)
    assert graph_state(found.model) == before


@each_form
@each_model
def test_adapters_go_from_a_captured_graph_to_the_model(name, form, tmp_path):
    found, model = model_and_graph(name, form=form)
    save_adapter(model, tmp_path)
    fresh = load_adapter(small_model(name).model, tmp_path)
    assert [s.host.name for s in sites(fresh).values()] == [s.host.name for s in sites(found.model).values()]
    assert torch.equal(found.run(fresh), found.run())
    assert len(report(model).sites) == len(sites(fresh))
    load_adapter(model, tmp_path)
    assert_close(found.run(model), found.run())


def test_an_adapter_of_an_exported_graph_is_alive_in_the_model(tmp_path):
    source = small_model("encoder_layer")
    program = torch.export.export(source.model, (source.inputs,))
    found = operate(SmallModel("encoder_layer", program.module(), source.inputs), example_inputs=None)
    randomise(found.model)
    fresh = load_adapter(source.model, save_adapter(found.model, tmp_path))
    assert_close(found.run(fresh), found.run())


@each_form
@each_whole
def test_a_deep_copy_of_a_captured_graph(name, form):
    found, model = model_and_graph(name, form=form)
    live = found.run(model)
    copied = copy.deepcopy(model)
    randomise(copied, 0.2)
    assert torch.equal(found.run(model), live)
    changed = found.run(copied)
    merge(model)
    assert torch.equal(found.run(copied), changed)
    assert {site.form for site in sites(copied).values()} == {form}
    merge(copied)
    assert_close(found.run(copied), changed)


def test_a_plain_model_and_wrong_options_are_refused():
    plain = small_model("mlp")
    before = state_of(plain.model)
    with pytest.raises(surgery.SurgeryError, match="carries no surgery"):
        to_graph(plain.model, plain.inputs)
    assert state_of(plain.model) == before
    found = operated("mlp")
    before = state_of(found.model)
    with pytest.raises(surgery.InputError, match="form"):
        to_graph(found.model, found.inputs, form="dense")
    with pytest.raises(surgery.InputError, match="keep_base"):
        to_graph(found.model, found.inputs, keep_base=False)
    with pytest.raises(surgery.InputError, match="example_inputs"):
        to_graph(found.model)
    with pytest.raises(surgery.CaptureError):
        to_graph(found.model, torch.randn(5, 11))
    assert state_of(found.model) == before
    assert record_of(found.model)


@each_form
def test_verified_graphs(form):
    found = operated("raw")
    model = to_graph(found.model, found.inputs, form=form, verify=True, debug=True)
    fold(model, verify=found.inputs, debug=True)
    merge(model, verify=found.inputs)
    assert_close(found.run(model), found.run())


@each_form
@each_whole
def test_the_whole_pipeline_gives_back_the_names_of_the_base(name, form):
    found, model = model_and_graph(name, form=form)
    plain = undo_surgery(model)
    compiled = pipeline(found.model, found.inputs, form=form)
    assert sorted(shape_of(compiled.graph.graph)) == sorted(shape_of(plain.graph))
    assert_close(found.run(compiled.graph), found.run())
    half_way = pipeline(found.model, found.inputs, form=form, stop_after="fold").graph
    products = {p.at for node in half_way.graph.nodes if (p := provenance_of(node))}
    assert products <= {node.name for node in half_way.graph.nodes}


@each_form
@each_whole
def test_the_whole_pipeline_is_verified(name, form):
    found = operated(name)
    result = pipeline(found.model, found.inputs, form=form, verify=True, debug=True)
    errors = {stage.name: stage.error for stage in result.stages}
    assert all(errors[name] <= RELATIVE[torch.float32] for name in ("insert", "fold", "merge"))
