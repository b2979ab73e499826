"""Graph modules: undo and failure leave the very graph, copies are independent, other models are never written."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx

import surgery
import surgery.hosting.graph_surgery
from passes.ir.provenance import KEY, provenance_of
from surgery import (
    fold,
    load_adapter,
    merge,
    report,
    save_adapter,
    set_coeff,
    sites,
    undo_surgery,
)
from tests.support.injected_failures import FAILURES, fails_at
from tests.support.model_state import state_of
from tests.support.operated_graphs import base, each_graph, graph, graph_state, operate, operated, shape_of, source
from tests.support.operated_models import randomise
from tests.support.tolerance import RELATIVE, relative_error
from tests.support.zoo import SmallModel


@each_graph
def test_undo_gives_back_the_very_graph(name):
    found = graph(name)
    next(found.model.parameters()).requires_grad_(False)
    before, output = graph_state(found.model), found.forward().detach()
    randomise(operate(found).model)
    assert graph_state(found.model) != before
    set_coeff(found.model, torch.ones(len(output)))
    assert undo_surgery(found.model) is found.model
    assert graph_state(found.model) == before
    assert torch.equal(found.forward().detach(), output)


@each_graph
def test_second_surgery_on_further_sites(name):
    found, whole = graph(name), operated(name)
    before, keys = graph_state(found.model), list(sites(whole.model))
    operate(found, target_modules=keys[1::2])
    operate(found, target_modules=keys[::2])
    assert set(sites(found.model)) == set(keys)
    for key, site in sites(found.model).items():
        site.core.load_state_dict(sites(whole.model)[key].core.state_dict())
    assert torch.equal(found.run(), whole.run())
    with pytest.raises(surgery.TargetError, match="already carries"):
        operate(found, target_modules=keys[:1])
    undo_surgery(found.model)
    assert graph_state(found.model) == before


def told(meta):
    """Metadata of a node without its provenance; an empty "custom" says nothing."""
    custom = {name: value for name, value in meta.get("custom", {}).items() if name != KEY}
    return {name: value for name, value in meta.items() if name != "custom"} | ({"custom": custom} if custom else {})


@each_graph
def test_nodes_keep_their_names_and_metadata(name):
    found, plain = graph(name), base(name)
    before = {node.name: (node, dict(node.meta)) for node in found.model.graph.nodes}
    randomise(operate(found).model)
    after = {node.name: node for node in found.model.graph.nodes}
    assert set(before) < set(after)
    outs = [node for node in found.model.graph.nodes if (p := provenance_of(node)) and p.role == "out"]
    assert {provenance_of(node).key for node in outs} == set(sites(found.model))
    for key, (node, meta) in before.items():
        assert provenance_of(node) is None  # of the graph that undo puts back
        assert told(after[key].meta) == told(meta)
    for out in outs:
        product = before[provenance_of(out).at][1]
        for field in ("val", "example_value", "stack_trace", "nn_module_stack"):
            assert (field in out.meta) == (field in product)
            assert out.meta.get(field) is product.get(field) or out.meta[field] == product[field]
    merge(found.model)
    for node, old in zip(found.model.graph.nodes, plain.model.graph.nodes, strict=True):
        assert node.name == old.name
        assert set(told(node.meta)) == set(told(old.meta))


def test_exported_products_have_metadata_at_all():
    found = operate(graph("exported"))
    outs = [node for node in found.model.graph.nodes if (p := provenance_of(node)) and p.role == "out"]
    assert len(outs) == 8  # one module is called twice
    assert all(isinstance(out.meta["val"], torch.Tensor) and out.meta["nn_module_stack"] for out in outs)


def changing(model: fx.GraphModule) -> dict:
    """The verbs that rewrite a graph."""
    return {"merge": lambda: merge(model), "fold": lambda: fold(model), "dense": lambda: fold(model, freeze_core=True)}


@pytest.mark.matrix
@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize(
    ("target", "call", "after"),
    [
        ("passes.transforms.insert.insert_delta", 1, False),
        ("passes.transforms.insert.insert_delta", 3, True),
        ("surgery.hosting.graph_surgery.run_pipeline", 1, False),
        ("surgery.hosting.graph_surgery.run_pipeline", 1, True),
        ("surgery.hosting.graph_surgery.copy_whole", 1, True),
        ("surgery.hosting.graph_surgery.copy_graph", 1, True),
    ],
)
@each_graph
def test_a_failure_leaves_the_graph(name, target, call, after, error, monkeypatch):
    found = graph(name)
    next(found.model.parameters()).requires_grad_(False)
    before, output = graph_state(found.model), found.run()
    with monkeypatch.context() as patch:
        fails_at(patch, target, call, error, after=after)
        with pytest.raises(error, match="injected"):
            operate(found)
    assert graph_state(found.model) == before
    assert sites(found.model) == {}
    assert "__deepcopy__" not in vars(type(found.model))
    randomise(operate(found).model)
    assert relative_error(found.run(), output) > 2 * RELATIVE[torch.float32]
    undo_surgery(found.model)
    assert graph_state(found.model) == before


@pytest.mark.matrix
@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize(
    "target", ["passes.transforms.insert.insert_delta", "surgery.hosting.graph_surgery.run_pipeline"]
)
@each_graph
def test_a_failure_of_the_second_surgery_leaves_the_first(name, target, error, monkeypatch):
    found = graph(name)
    untouched, keys = graph_state(found.model), list(sites(operated(name).model))
    randomise(operate(found, target_modules=keys[1::2]).model)
    before, output = graph_state(found.model), found.run()
    with monkeypatch.context() as patch:
        fails_at(patch, target, 1, error)
        with pytest.raises(error, match="injected"):
            operate(found, target_modules=keys[::2])
    assert graph_state(found.model) == before
    assert torch.equal(found.run(), output)
    assert set(sites(found.model)) == set(keys[1::2])
    undo_surgery(found.model)
    assert graph_state(found.model) == untouched


@pytest.mark.matrix
@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("verb", ["merge", "fold", "dense"])
@pytest.mark.parametrize("after", [False, True])
@each_graph
def test_a_failure_of_a_rewriting_verb_leaves_the_operated_graph(name, verb, after, error, monkeypatch):
    found = graph(name)
    untouched = graph_state(found.model)
    randomise(operate(found).model)
    before, output = graph_state(found.model), found.run()
    with monkeypatch.context() as patch:
        fails_at(patch, "surgery.hosting.graph_surgery.run_pipeline", 1, error, after=after)
        with pytest.raises(error, match="injected"):
            changing(found.model)[verb]()
    assert graph_state(found.model) == before
    assert torch.equal(found.run(), output)
    undo_surgery(found.model)
    assert graph_state(found.model) == untouched


@pytest.mark.parametrize("error", FAILURES)
@each_graph
def test_a_failure_while_loading_leaves_the_old_adapter(name, error, monkeypatch, tmp_path):
    found = operated(name)
    save_adapter(found.model, tmp_path)
    randomise(found.model, 0.5)
    before, output = graph_state(found.model), found.run()
    with monkeypatch.context() as patch:
        fails_at(patch, "passes.transforms.insert.insert_delta", 2, error)
        with pytest.raises(error, match="injected"):
            load_adapter(found.model, tmp_path)
    assert graph_state(found.model) == before
    assert torch.equal(found.run(), output)


@each_graph
def test_a_graph_that_needs_no_surgery_is_refused_as_it_was(name):
    found = graph(name)
    before = graph_state(found.model)
    for options in ({"target_modules": ["nothing"]}, {"r": 0}, {"variant": "none"}):
        with pytest.raises(surgery.SurgeryError):
            operate(found, **options)
    assert graph_state(found.model) == before
    for verb in (undo_surgery, merge, report, fold, lambda model: set_coeff(model, 1.0)):
        with pytest.raises(surgery.SurgeryError):
            verb(found.model)
    assert graph_state(found.model) == before


@pytest.mark.matrix
@pytest.mark.parametrize("verb", [merge, undo_surgery, fold, lambda model: set_coeff(model, 0.2)])
@each_graph
def test_a_deep_copy_leaves_the_original_alone_and_is_left_alone(name, verb):
    found = operated(name)
    before, output = graph_state(found.model), found.run()
    copied, other = copy.deepcopy(found.model), copy.deepcopy(copy.deepcopy(found.model))
    assert list(sites(copied)) == list(sites(found.model))
    assert not {id(t) for t in copied.state_dict(keep_vars=True).values()} & {
        id(t) for t in found.model.state_dict(keep_vars=True).values()
    }
    assert torch.equal(found.run(copied), output)
    verb(copied)
    assert graph_state(found.model) == before
    assert torch.equal(found.run(), output)
    changed = found.run(copied)
    verb(found.model)
    assert torch.equal(found.run(), changed)
    assert torch.equal(found.run(other), output)
    verb(other)
    assert torch.equal(found.run(other), changed)
    assert list(other.state_dict()) == list(found.model.state_dict())


@each_graph
def test_an_undone_copy_is_the_base(name):
    plain, found = base(name), operated(name)
    copied = undo_surgery(copy.deepcopy(found.model))
    assert shape_of(copied.graph) == shape_of(plain.model.graph)
    assert list(copied.state_dict()) == list(plain.model.state_dict())
    assert torch.equal(found.run(copied), plain.run())
    again = copy.deepcopy(copied)
    assert torch.equal(found.run(again), plain.run())
    assert list(sites(operate(SmallModel(name, again, found.inputs)).model)) == list(sites(found.model))


@pytest.mark.parametrize("verb", [merge, undo_surgery, fold, lambda model: set_coeff(model, 0.0)])
def test_the_source_of_a_symbolic_trace_never_changes(verb):
    found = source("symbolic")
    before, output = state_of(found.model), found.run()
    model = fx.symbolic_trace(found.model)
    for _ in range(2):
        randomise(operate(SmallModel("shared", model, found.inputs)).model)
        assert torch.equal(found.run(), output)
        assert [s.replace("(False,", "(True,") for s in state_of(found.model)] == before
        verb(model)
        assert torch.equal(found.run(), output)
        if sites(model):
            undo_surgery(model)
        assert state_of(found.model) == before
