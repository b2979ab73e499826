"""Fuse: one down-projection for sites that read the same input, and that everything after it goes on working."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import surgery
from passes.infra.dialect import check_graph
from passes.ir.provenance import adapter_instances, provenance_of
from passes.transforms.fuse_projections import Fuse
from passes.transforms.merge_adapters import Merge
from surgery import apply_surgery, fold, fuse, merge, set_coeff, sites, to_graph
from surgery.variants import REGISTRY
from tests.support.fused_graphs import (
    DIALECT,
    block,
    graphs,
    holders,
    operated,
    products,
    run,
    trained,
)
from tests.support.tolerance import assert_close
from tests.support.zoo import VARIED, in_the_gate

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def adapted(model: nn.Module, name: str, x: torch.Tensor, coeff: torch.Tensor) -> torch.Tensor:
    """A site in float64, each step as the definition has it: ``x W^T + b + delta(x Vh^T) U^T``."""
    site = sites(model)[name]
    U, S, Vh, g = (t.detach().double() for t in (site.factors.U, site.factors.S, site.factors.Vh, site.core.g))
    y = x @ site.weight.detach().double().T + (0.0 if site.bias is None else site.bias.detach().double())
    e = coeff.double().reshape(-1, 1, 1) * g
    return y + ((x @ Vh.T) * S * torch.where(e > 0, e, e.exp() - 1)) @ U.T


def reference(model: nn.Module, x: torch.Tensor, coeff: torch.Tensor) -> torch.Tensor:
    """The whole block in float64."""
    x = x.double()
    q, k, v = (adapted(model, name, x, coeff) for name in "qkv")
    x = x + adapted(model, "o", torch.sigmoid(q) * k + v, coeff)
    gate, up = (adapted(model, name, x, coeff) for name in ("gate", "up"))
    return x + adapted(model, "down", torch.tanh(gate) * up, coeff)


def test_what_is_fused_and_what_is_modified():
    plain, fused, _ = graphs()
    assert (products(plain), products(fused)) == (21, 21 - 2 - 1)
    # for n sites: n products and n tensors go, n slices, one product and one tensor come
    assert len(plain.graph.nodes) - len(fused.graph.nodes) == (3 - 2) + (2 - 2)
    assert Fuse().run(plain).modified
    assert len(plain.graph.nodes) == len(fused.graph.nodes)
    again = Fuse().run(plain, debug=True)
    assert (again.modified, again.nodes, len(holders(plain))) == (False, again.nodes_before, 2)
    assert sorted(len(rows.rows) for rows in holders(plain)) == [6 + 8, 7 + 5 + 6]
    keys = {provenance_of(n).key for n in plain.graph.nodes if provenance_of(n) and provenance_of(n).role == "shared"}
    assert {frozenset(key.split(" + ")) for key in keys} == {frozenset("qkv"), frozenset(("gate", "up"))}


def test_nothing_to_fuse():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 6)
    apply_surgery(model, "antipasto", r=3, example_inputs=x, progress=False)
    graph = to_graph(model, x)
    result = Fuse().run(graph)
    assert (result.modified, result.nodes, holders(graph)) == (False, result.nodes_before, [])


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_computes_what_the_definition_says(dtype):
    model, x = operated(dtype=dtype)
    graph = to_graph(model, x, fuse=True, verify=True)
    for coeff in (torch.tensor(1.0), torch.tensor(-0.6), torch.linspace(-1, 1.5, 4)):
        set_coeff(graph, coeff)
        assert_close(run(graph, x), reference(model, x, coeff), dtype)
    rows = torch.linspace(-1, 1, 2)  # two inputs a row
    assert_close(run(set_coeff(graph, rows, rows="repeat"), x), reference(model, x, rows.repeat_interleave(2)), dtype)
    for size in ((1, 3, 12), (6, 1, 12)):
        other = torch.randn(size).to(dtype)
        assert_close(run(set_coeff(graph, 0.5), other), reference(model, other, torch.tensor(0.5)), dtype)
    with pytest.raises(surgery.InputError, match=r"coeff has 3 rows.*batch of 4"):
        run(set_coeff(graph, torch.ones(3)), x)


@pytest.mark.parametrize("variant", in_the_gate(REGISTRY, *VARIED))
def test_every_variant(variant):
    plain, fused, x = graphs(variant)
    assert len(holders(fused)) == 2
    live = run(plain, x)
    assert_close(run(fused, x), live)
    base = surgery.undo_surgery(copy.deepcopy(plain)).requires_grad_(False)
    for coeff in (0.0, torch.zeros(4)):
        assert torch.equal(run(set_coeff(fused, coeff), x), run(base, x))
    set_coeff(fused, 1.0)
    if any(p.requires_grad for p in fused.parameters()):
        gradients = []
        for graph in (plain, fused):
            graph.zero_grad()
            graph(x).square().mean().backward()
            gradients.append({n: p.grad.clone() for n, p in graph.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert_close(gradients[1][name], gradient)
    assert_close(run(fold(fused, verify=x, debug=DIALECT(variant)), x), live)
    if REGISTRY[variant].linear:
        weights = {key: site.merged_weight() for key, site in sites(plain).items()}
        merge(fused, verify=x)
        assert (sites(fused), holders(fused)) == ({}, [])
        assert all(torch.equal(fused.get_parameter(f"{key}.weight"), weight) for key, weight in weights.items())


def test_the_input_gets_its_gradient():
    plain, fused, x = graphs()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for graph, each in zip((plain, fused), inputs, strict=True):
        graph(each).square().mean().backward()
    assert_close(inputs[1].grad, inputs[0].grad)


@pytest.mark.parametrize("first", ["fold", "fuse"])
def test_S_meets_the_rows_of_its_own_site(first):
    plain, graph, x = graphs()
    live = run(plain, x)
    fold(plain)
    if first == "fold":
        fuse(graph := plain, verify=x, debug=True)
    else:
        fold(graph, verify=x, debug=True)
    assert not any(str(node.target).endswith("factors.S") for node in graph.graph.nodes)
    assert products(graph) == 18
    assert_close(run(graph, x), live)
    for rows in holders(graph):
        scaled = [site.factors.S[:, None] * site.factors.Vh for site in sites(graph).values()]
        read = rows.folded_0 if first == "fuse" else rows.rows
        for start, stop in rows.bounds():
            assert any(s.shape == read[start:stop].shape and torch.allclose(s, read[start:stop]) for s in scaled)
    assert not Fuse().run(graph).modified
    count = len(graph.graph.nodes)
    fold(graph)
    assert len(graph.graph.nodes) == count
    assert_close(run(set_coeff(graph, -0.5), x), run(set_coeff(plain, -0.5), x))


def test_a_fused_graph_folds_completely():
    plain, fused, x = graphs()
    fold(fused, freeze_core=True, verify=x, debug=True)
    assert (sites(fused), holders(fused)) == ({}, [])
    assert len(fused.graph.nodes) == len(merge(plain).graph.nodes)
    assert torch.equal(run(fused, x), run(plain, x))


def test_merging_some_sites_leaves_the_others():
    plain, fused, x = graphs()
    live, weights = run(plain, x), {key: site.merged_weight() for key, site in sites(fused).items()}
    for keys, left in ((["q"], 18 - 1), (["gate", "up"], 17 - 2 - 1), (["k"], 14 - 1), (["v"], 13 - 2)):
        assert Merge({key: weights[key] for key in keys}).run(fused, debug=True).modified
        assert products(fused) == left
        assert not check_graph(fused)
        assert_close(run(fused, x), live)
    assert not any(provenance_of(node) and provenance_of(node).role == "shared" for node in fused.graph.nodes)
    assert {place.provenance.key for place in adapter_instances(fused.graph)} == {"o", "down"}


def test_a_merged_site_is_dropped_and_the_others_keep_their_rows():
    model, x = block()
    for variant, targets in (("antipasto", ["q", "v"]), ("sspace", ["k"])):
        generator = torch.Generator().manual_seed(2)
        sets = ([torch.randn(4, 6, 12, generator=generator)] for _ in range(2))
        calibration = surgery.Contrast(*sets) if variant == "sspace" else None
        apply_surgery(
            model, variant, r=5, target_modules=targets, example_inputs=x, calibration=calibration, progress=False
        )
    graph = to_graph(trained(model), x, fuse=True)
    Merge({key: sites(graph)[key].merged_weight() for key in ("q", "v")}).run(graph)
    surgery.hosting.graph_surgery.drop_sites(graph, ["q", "v"])
    assert len(holders(graph)) == 1
    assert_close(run(graph, x), run(model, x))
    for coeff in (torch.tensor([0.0, 1.0, -1.0, 0.5]),):
        with pytest.raises(AssertionError):
            assert_close(run(set_coeff(graph, coeff), x), run(model, x))
