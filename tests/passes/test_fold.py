"""Fold: what meets, what does not, and that nothing that lives is taken for a constant."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import surgery
from passes.errors import PassError
from passes.ir.provenance import adapter_instances
from passes.transforms.fold import Fold
from passes.transforms.fold_constants import fold_constants, is_pure
from surgery import apply_surgery, fold, merge, set_coeff, sites, steer, to_graph, undo_surgery
from surgery.verbs.graph import _tensors
from tests.support.tolerance import assert_close
from tests.support.zoo import Forward, built_once, small_model

aten = torch.ops.aten


@built_once
def operated(form: str = "delta", dtype: torch.dtype = torch.float32, **options):
    """An operated model with cores away from identity, and its graph."""
    found = small_model("mlp", dtype)
    apply_surgery(found.model, surgery.AntiPaSTO(r=5), example_inputs=found.inputs, progress=False, **options)
    generator = torch.Generator().manual_seed(1)
    for site in sites(found.model).values():
        site.core.g.data.copy_(0.5 * torch.randn(site.core.g.shape, generator=generator))
    return found, to_graph(found.model, found.inputs, form=form)


def targets(graph: fx.GraphModule) -> list[object]:
    return [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_split_gives_the_stored_weight_back(dtype):
    found, graph = operated("residual", dtype)
    assert all(site.form == "residual" for site in sites(graph).values())
    assert all(site.W_res.dtype == torch.promote_types(dtype, torch.float32) for site in sites(graph).values())
    assert_close(found.run(graph), found.run())
    base = small_model("mlp", dtype)
    base.model.requires_grad_(False)
    fold(graph, verify=found.inputs, debug=True)
    assert all(site.form == "delta" and not hasattr(site, "W_res") for site in sites(graph).values())
    with steer(graph, 0.0):
        assert torch.equal(found.run(graph), base.run())
    assert_close(found.run(graph), found.run())


def test_residual_and_delta_fold_to_the_same_graph():
    (_, one), (_, other) = operated("residual"), operated("delta")
    fold(one)
    fold(other)
    assert len(one.graph.nodes) == len(other.graph.nodes)
    assert sorted(map(str, targets(one))) == sorted(map(str, targets(other)))


def test_a_weight_that_was_not_kept_is_rounded_once():
    found = small_model("mlp")
    apply_surgery(found.model, "antipasto", r=5, example_inputs=found.inputs, progress=False)
    weights = {key: site.weight.detach().clone() for key, site in sites(found.model).items()}
    graph = to_graph(found.model, found.inputs, form="residual", keep_base=False)
    assert not any(name.endswith("weight") for name, _ in graph.named_parameters())
    with pytest.raises(surgery.SurgeryError, match="was not kept"):
        undo_surgery(graph)
    errors = {key: site.base_error for key, site in sites(graph).items()}
    assert all(0 <= error < 2e-7 for error in errors.values())
    fold(graph, verify=found.inputs)
    for key, site in sites(graph).items():
        error = float((site.weight - weights[key]).abs().max() / weights[key].abs().max())
        assert error == pytest.approx(errors[key], abs=1e-9)
        assert_close(site.weight, weights[key], rounded=True)


def test_folding_twice_changes_nothing_more():
    _, graph = operated("residual")
    fold(graph)
    result = Fold(_tensors(graph, "factors.")).run(graph)
    assert not result.modified


def test_S_meets_Vh():
    found, graph = operated()
    before = targets(graph)
    live = found.run(graph)
    fold(graph, verify=found.inputs)
    after = targets(graph)
    n = len(sites(graph))
    assert before.count(aten.mul.Tensor) - after.count(aten.mul.Tensor) == n
    assert not any(str(target).endswith("factors.S") for target in after)
    assert sum(str(target).endswith("folded_0") for target in after) == n
    for site in sites(graph).values():
        assert_close(site.folded_0, site.factors.S[:, None] * site.factors.Vh, rounded=True)
    assert_close(found.run(graph), live)


def test_a_folded_graph_still_trains_and_steers():
    found, graph = operated("residual")
    fold(graph)
    found.forward(graph).square().mean().backward()
    found.forward().square().mean().backward()
    for key, site in sites(graph).items():
        assert site.core.g is sites(found.model)[key].core.g  # both models wrote to one gradient
        assert site.core.g.grad.abs().max() > 0
    for coeff in (0.0, 0.5, -2.0):
        with steer(graph, coeff), steer(found.model, coeff):
            assert_close(found.run(graph), found.run())
    rows = torch.linspace(-1, 1, len(found.inputs))
    with steer(graph, rows), steer(found.model, rows):
        assert_close(found.run(graph), found.run())


def test_a_frozen_core_folds_completely():
    found, graph = operated()
    base = len(merge(to_graph(found.model, found.inputs)).graph.nodes)
    live = found.run()
    set_coeff(graph, 0.7)
    fold(graph, freeze_core=True, verify=found.inputs, debug=True)
    assert (sites(graph), len(graph.graph.nodes)) == ({}, base)
    assert not any("sspace" in name for name, _ in graph.named_modules())
    with steer(found.model, 0.7):
        assert_close(found.run(graph), found.run())
    assert torch.equal(found.run(), live)
    assert all(site.core.g.requires_grad for site in sites(found.model).values())


def test_a_frozen_core_with_a_live_coeff_still_steers():
    found, graph = operated()
    fold(graph, freeze_core=True, freeze_coeff=False, verify=found.inputs)
    assert len(sites(graph)) == 3
    for coeff in (0.0, 1.0, -1.5):
        with steer(graph, coeff), steer(found.model, coeff):
            assert_close(found.run(graph), found.run())


def test_a_frozen_coeff_with_a_live_core_trains_and_no_longer_steers():
    found, graph = operated()
    set_coeff(graph, 0.5)
    fold(graph, freeze_coeff=True, verify=found.inputs)
    with pytest.raises(surgery.InputError, match="folded into a constant"):
        set_coeff(graph, 1.0)
    with steer(found.model, 0.5):
        assert_close(found.run(graph), found.run())
        found.forward(graph).sum().backward()
    assert all(site.core.g.grad.abs().max() > 0 for site in sites(graph).values())


def test_rows_are_no_constant():
    found, graph = operated()
    set_coeff(graph, torch.ones(len(found.inputs)))
    with pytest.raises(surgery.InputError, match="steers the rows"):
        fold(graph, freeze_core=True)


def test_what_requires_a_gradient_is_refused():
    _, graph = operated()
    with pytest.raises(PassError, match="requires a gradient"):
        Fold(_tensors(graph, "factors.", "core.")).run(graph)
    with pytest.raises(PassError, match="is no tensor"):
        Fold(["sspace.nothing"]).run(graph)


def test_fold_wants_an_operated_graph():
    found, _ = operated()
    with pytest.raises(surgery.InputError, match="use to_graph first"):
        fold(found.model)
    with pytest.raises(surgery.SurgeryError, match="carries no surgery"):
        fold(fx.symbolic_trace(nn.Linear(2, 2)))


def traced(function, **members) -> fx.GraphModule:
    """A graph of ATen operations on frozen buffers and one input."""
    model = Forward(function, **members)
    return torch.export.export(model, (torch.randn(3, 4),), strict=False).module()


def test_constants_fold_where_they_are_listed():
    a, b = torch.randn(4), torch.randn(4)
    graph = traced(lambda m, x: x * (m.a.exp() + m.b) + m.b.sin(), a=a, b=b)
    x = torch.randn(3, 4)
    expected = graph(x)
    assert fold_constants(graph, ["a"]) == 1  # exp(a) alone
    graph.recompile()
    assert torch.equal(graph(x), expected)
    assert fold_constants(graph, ["a", "b", "folded_0"]) == 2
    graph.graph.lint()
    graph.recompile()
    assert torch.equal(graph(x), expected)
    assert fold_constants(graph, ["folded_0", "folded_1", "folded_2"]) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + torch.nn.functional.dropout(m.a, 0.5, True),
        lambda m, x: x + torch.rand_like(m.a),
        lambda m, x: x + m.a.mul_(2),
        lambda m, x: x + m.a.bernoulli(0.5),
    ],
)
def test_randomness_and_mutation_do_not_fold(function):
    graph = traced(function, a=torch.rand(4))
    nodes = len(graph.graph.nodes)
    fold_constants(graph, ["a"])
    impure = [node for node in graph.graph.nodes if node.op == "call_function" and not is_pure(node)]
    assert impure
    assert len(graph.graph.nodes) == nodes


def test_a_trainable_tensor_is_no_constant_even_if_listed():
    graph = traced(lambda m, x: x * m.w.exp(), w=nn.Parameter(torch.randn(4)))
    assert fold_constants(graph, ["w"]) == 0
    graph.w.requires_grad_(False)
    assert fold_constants(graph, ["w"]) == 1


def test_only_chosen_sites_fold():
    _, graph = operated("residual")
    key = next(iter(sites(graph)))
    path = f"sspace.{key}."
    Fold([name for name in _tensors(graph, "factors.") if name.startswith(path)], [key]).run(graph)
    forms = {place.provenance.key: place.provenance.form for place in adapter_instances(graph.graph)}
    assert forms.pop(key) == "delta"
    assert set(forms.values()) == {"residual"}


def test_a_graph_module_takes_the_residual_form():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).requires_grad_(False), torch.randn(3, 6)
    base = model(x)
    graph = apply_surgery(fx.symbolic_trace(model), "antipasto", r=3, form="residual", progress=False)
    assert {site.form for site in sites(graph).values()} == {"residual"}
    assert_close(graph(x), base)
    assert torch.equal(undo_surgery(graph)(x), base)
    with pytest.raises(surgery.InputError, match=r"use to_graph\(model, inputs, form='residual', keep_base=False"):
        apply_surgery(fx.symbolic_trace(model), "antipasto", form="residual", keep_base=False, progress=False)
    with pytest.raises(surgery.InputError, match="form must be"):
        apply_surgery(fx.symbolic_trace(model), "antipasto", form="other", progress=False)
