"""Translation validation: every injected fault is refused, with the pass and the first diverging site by name."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import fx, nn

import surgery
from passes.errors import PassError
from passes.infra.translation_validation import Validation
from passes.ir.provenance import provenance_of
from passes.transforms import fold as fold_pass
from passes.transforms import fold_constants as constants
from passes.transforms import merge_adapters as merge_pass
from passes.transforms.fold import Fold
from passes.transforms.insert import Insert
from passes.transforms.merge_adapters import Merge
from surgery import apply_surgery, fold, merge, set_coeff, sites, to_graph
from surgery.modules.adapter import Adapter
from tests.support.graph_listing import listing, tensors
from tests.support.pass_stages import KEYS, STAGES, X, after, between, chain, graph_of, named, nodes_at, operated
from tests.support.tolerance import assert_close


def refused(name: str, site: str = "2") -> Any:
    return pytest.raises(PassError, match=rf"'{name}' changed what the model computes, first at site '{site}'")


def transposed(ending: str) -> Any:
    return lambda graph: between(named(graph, "2", ending), torch.ops.aten.t.default)


def through_bfloat16(ending: str) -> Any:
    def fault(graph: fx.GraphModule) -> None:
        node = named(graph, "2", ending)
        between(node, torch.ops.aten.to.dtype, torch.bfloat16)
        between(node.next, torch.ops.aten.to.dtype, torch.float32)

    return fault


def swapped(ending: str) -> Any:
    def fault(graph: fx.GraphModule) -> None:
        one, other = named(graph, "2", ending), named(graph, "4", ending)
        one.target, other.target = other.target, one.target

    return fault


def baked(ending: str, value: float) -> Any:
    """A tensor of the adapter as a constant of its own: what it was at some other time."""

    def fault(graph: fx.GraphModule) -> None:
        node = named(graph, "2", ending)
        path = str(node.target)
        holder = graph.get_submodule(path.rpartition(".")[0])
        tensor = getattr(holder, path.rpartition(".")[2])
        holder.register_buffer("stale", torch.full_like(tensor, value).detach() if value else tensor.detach().clone())
        node.target = path.rpartition(".")[0] + ".stale"

    return fault


def without_bias(graph: fx.GraphModule) -> None:
    node = next(n for n in nodes_at(graph, "2") if provenance_of(n).role == "base")
    node.args = node.args[:2]


def scaled(graph: fx.GraphModule) -> None:
    """One per cent too much, which bfloat16's own tolerance would let pass."""
    out = next(n for n in nodes_at(graph, "2") if provenance_of(n).role == "out")
    between(out, torch.ops.aten.mul.Tensor, 1.01)


INSERTED = {
    "transposed U": (transposed("factors.U"), ("delta", "residual")),
    "transposed Vh": (transposed("factors.Vh"), ("delta", "residual")),
    "swapped cores": (swapped("core.g"), ("delta", "residual")),
    "swapped factors": (swapped("factors.Vh"), ("delta", "residual")),
    "coeff of 1": (baked("steering.coeff", 1.0), ("delta", "residual")),
    "coeff as it is": (baked("steering.coeff", 0.0), ("delta", "residual")),
    "core as it is": (baked("core.g", 0.0), ("delta", "residual")),
    "bfloat16": (through_bfloat16("factors.U"), ("delta", "residual")),
    "scale": (scaled, ("delta", "residual")),
    "transposed remainder": (transposed("W_res"), ("residual",)),
    "swapped remainders": (swapped("W_res"), ("residual",)),
    "remainder in bfloat16": (through_bfloat16("W_res"), ("residual",)),
    "no bias": (without_bias, ("residual",)),
}
EACH_INSERTED = [(name, form) for name, (_, forms) in INSERTED.items() for form in forms]


@pytest.mark.parametrize(("name", "form"), EACH_INSERTED)
def test_a_fault_in_insert_is_refused(name, form, monkeypatch):
    model = operated(r=4 if "remainder" in name else 8)  # at full rank the remainder is zero
    live = model(X).detach()
    assert_close(to_graph(model, X, form=form, verify=True, debug=True)(X), live)
    before = tensors(model)
    after(monkeypatch, Insert, INSERTED[name][0])
    with refused("insert"):
        to_graph(model, X, form=form, verify=True)
    with refused("insert"):
        surgery.verbs.graph.pipeline(model, X, form=form, verify=True)
    assert tensors(model) == before
    assert torch.equal(model(X), live)
    to_graph(model, X, form=form)  # unverified, it goes through


FOLDED = {
    "transposed U": transposed("factors.U"),
    "transposed Vh": transposed("folded_0"),
    "swapped": swapped("folded_0"),
    "swapped cores": swapped("core.g"),
    "coeff of 1": baked("steering.coeff", 1.0),
    "coeff as it is": baked("steering.coeff", 0.0),
    "core as it is": baked("core.g", 0.0),
    "bfloat16": through_bfloat16("folded_0"),
    "scale": scaled,
}


def refuses(call: Any, graph: fx.GraphModule, name: str, site: str = "2") -> None:
    """The call is refused, and the model is what it was."""
    same_graph, nodes, state, output = graph.graph, listing(graph), tensors(graph), graph(X).detach()
    keys, forms = list(sites(graph)), [s.form for s in sites(graph).values()]
    with refused(name, site):
        call(graph)
    assert graph.graph is same_graph
    assert listing(graph) == nodes
    left = {path: value for path, value in tensors(graph).items() if not path.endswith(".stale")}  # the fault's own
    assert left == state
    assert list(sites(graph)) == keys
    assert [s.form for s in sites(graph).values()] == forms
    assert torch.equal(graph(X), output)


@pytest.mark.parametrize("form", ["delta", "residual"])
@pytest.mark.parametrize("name", FOLDED)
def test_a_fault_in_fold_is_refused(name, form, monkeypatch):
    graph = graph_of(form)
    live = graph(X).detach()
    assert_close(fold(copy.deepcopy(graph), verify=X, debug=True)(X), live)
    after(monkeypatch, Fold, FOLDED[name])
    refuses(lambda graph: fold(graph, verify=X), graph, "fold")
    with refused("fold"):
        surgery.verbs.graph.pipeline(operated(), X, form=form, verify=True)
    fold(graph)


def test_a_stale_constant_is_refused(monkeypatch):
    """A product that was computed when S was another."""
    graph = graph_of()
    fold(copy.deepcopy(graph), verify=X)
    store = constants.store

    def stale(graph_module: fx.GraphModule, node: fx.Node, value: Any) -> str:
        old = 1.1 * value if provenance_of(node).key == "2" else value
        return store(graph_module, node, old)

    monkeypatch.setattr(fold_pass, "store", stale)
    refuses(lambda graph: fold(graph, verify=X), graph, "fold")


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_wrong_base_after_residual_form_is_refused(keep_base, monkeypatch):
    graph = graph_of("residual", keep_base=keep_base)
    fold(copy.deepcopy(graph), verify=X)
    take_out = fold_pass.take_out

    def broken(place: Any, names: Any) -> fx.Node:
        node = take_out(place, names)
        if place.provenance.key == "2":
            node.args = node.args[:2]
        return node

    monkeypatch.setattr(fold_pass, "take_out", broken)
    refuses(lambda graph: fold(graph, verify=X), graph, "fold")


MERGED = {
    "transposed": lambda weights: weights | {"2": weights["2"].T.contiguous()},
    "swapped": lambda weights: weights | {"2": weights["4"], "4": weights["2"]},
    "swapped with the last": lambda weights: weights | {"2": weights["0"]},
    "bfloat16": lambda weights: weights | {"2": weights["2"].bfloat16().float()},
    "twice too large": lambda weights: weights | {"2": 1.01 * weights["2"]},
}


@pytest.mark.parametrize("form", ["delta", "residual"])
@pytest.mark.parametrize("name", MERGED)
def test_wrong_weights_in_merge_are_refused(name, form, monkeypatch):
    graph = graph_of(form)
    live = graph(X).detach()
    assert_close(merge(copy.deepcopy(graph), verify=X)(X), live)
    init = Merge.__init__

    def broken(self: Merge, weights: Any, **options: Any) -> None:
        init(self, MERGED[name](weights) if weights else weights, **options)

    monkeypatch.setattr(Merge, "__init__", broken)
    refuses(lambda graph: merge(graph, verify=X), graph, "merge")
    with refused("merge"):
        surgery.verbs.graph.pipeline(operated(), X, form=form, verify=True)
    merge(graph)


@pytest.mark.parametrize("form", ["delta", "residual"])
def test_a_dropped_bias_in_merge_is_refused(form, monkeypatch):
    graph = graph_of(form)
    merge(copy.deepcopy(graph), verify=X)
    take_out = merge_pass.take_out

    def broken(place: Any, names: Any) -> fx.Node:
        node = take_out(place, names)
        if place.provenance.key == "2":
            node.args = node.args[:2]
        return node

    monkeypatch.setattr(merge_pass, "take_out", broken)
    refuses(lambda graph: merge(graph, verify=X), graph, "merge")


def test_a_weight_of_a_stale_coeff_is_refused(monkeypatch):
    """Dense weights that were computed while coeff was 1."""
    graph = set_coeff(graph_of(), 1.0)
    weights = {key: site.merged_weight() for key, site in sites(graph).items()}
    set_coeff(graph, 0.9)
    validation = Validation(((X,), {}))
    with refused("merge", "0"):
        Merge(weights).run(copy.deepcopy(graph), validation=validation)
    monkeypatch.setattr(Adapter, "merged_weight", lambda site: weights[site.key])
    for form in ("delta", "residual"):
        dense = graph_of(form)
        refuses(lambda graph: fold(graph, freeze_core=True, verify=X), dense, "fold", "0")


def test_a_wrong_fold_of_frozen_cores_is_refused(monkeypatch):
    graph = graph_of()
    fold(copy.deepcopy(graph), freeze_core=True, verify=X)
    fold(copy.deepcopy(graph), freeze_core=True, freeze_coeff=False, verify=X)
    flags = [p.requires_grad for p in graph.parameters()]
    after(monkeypatch, Fold, transposed("factors.U"))
    refuses(lambda graph: fold(graph, freeze_core=True, freeze_coeff=False, verify=X), graph, "fold")
    assert [p.requires_grad for p in graph.parameters()] == flags


def test_the_first_of_several_faults_is_named(monkeypatch):
    def faults(graph: fx.GraphModule) -> None:
        for key in ("4", "2"):
            between(named(graph, key, "factors.U"), torch.ops.aten.t.default)

    after(monkeypatch, Insert, faults)
    with refused("insert", "2"):
        to_graph(operated(), X, verify=True)


def test_a_fault_after_the_last_site_is_named_so(monkeypatch):
    def fault(graph: fx.GraphModule) -> None:
        output = graph.graph.output_node()
        between(output.all_input_nodes[0], torch.ops.aten.neg.default)

    plain = nn.Sequential(*chain(), nn.Tanh())
    model = apply_surgery(plain, "antipasto", r=4, example_inputs=X, progress=False)
    to_graph(model, X, verify=True)
    after(monkeypatch, Insert, fault)
    with pytest.raises(PassError, match="pass 'insert' changed what the model computes, in its outputs"):
        to_graph(model, X, verify=True)


def test_a_lost_site_is_named(monkeypatch):
    def fault(graph: fx.GraphModule) -> None:
        for node in nodes_at(graph, "2"):
            if provenance_of(node).role == "out":
                node.replace_all_uses_with(node.args[0])
        graph.graph.eliminate_dead_code()

    after(monkeypatch, Insert, fault)
    with pytest.raises(PassError, match=r"pass 'insert'.*site '2'"):
        to_graph(operated(), X, verify=True)


def test_a_graph_that_does_not_run_is_refused(monkeypatch):
    graph = graph_of()
    after(monkeypatch, Fold, lambda graph: between(named(graph, "2", "factors.U"), torch.ops.aten.select.int, 0, 0))
    with pytest.raises(PassError, match="after pass 'fold' the graph does not run"):
        fold(graph, verify=X)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_writes_to_what_a_site_gives_passes(inplace):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 8), nn.ReLU(inplace=inplace))
    apply_surgery(model.eval(), "antipasto", r=4, example_inputs=X, progress=False)
    for site in sites(model).values():
        site.core.g.data.normal_()
    live = model(X).detach()
    for form in ("delta", "residual"):
        graph = to_graph(model, X, form=form, verify=True)
        assert_close(merge(fold(graph, verify=X), verify=X)(X), live)


def test_one_module_at_two_paths_is_one_site_in_the_graph():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(8, 4)).eval()
    apply_surgery(model, "antipasto", r=4, example_inputs=X, progress=False)
    for site in sites(model).values():
        site.core.g.data.normal_()
    for form in ("delta", "residual"):
        graph = to_graph(model, X, form=form, verify=True)
        assert_close(graph(X), model(X).detach())
        assert_close(merge(fold(graph, verify=X), verify=X)(X), model(X).detach())


@pytest.mark.parametrize("keep_base", [True, False])
def test_tied_sites_from_residual_form_to_merge(keep_base):
    model = chain()
    model[2].weight = model[0].weight
    apply_surgery(model, "antipasto", r=4, example_inputs=X, target_modules=KEYS, progress=False)
    for site in sites(model).values():
        site.core.g.data.normal_()
    live = model(X).detach()
    graph = to_graph(model, X, form="residual", keep_base=keep_base, verify=True)
    assert_close(merge(copy.deepcopy(graph), untie=True)(X), live)
    fold(graph, verify=X)
    assert_close(graph(X), live)
    assert_close(merge(graph, untie=True)(X), live)


class Stateful(nn.Module):
    """Random numbers, and a buffer that every forward writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        noise = torch.rand_like(x) * self.seen
        return self.outer(torch.tanh(self.inner(x) + noise))


def test_validation_leaves_everything_as_it_was():
    graph = torch.export.export(Stateful().eval(), (X,), strict=False).module()
    apply_surgery(graph, "antipasto", r=4, progress=False)
    set_coeff(graph, 0.5)
    places = {n.name: provenance_of(n).key for n in graph.graph.nodes if (m := provenance_of(n)) and m.role == "base"}
    objects = [*graph.parameters(), *graph.buffers()]
    x, before = X.clone(), tensors(graph)
    torch.manual_seed(3)
    random.seed(3)
    numbers, python = torch.get_rng_state(), random.getstate()
    validation = Validation(((x,), {}), random=2)
    found = validation.observe(graph, places)
    assert len(found) == 3
    assert set(found[0]) == {provenance_of(n).at for n in graph.graph.nodes if provenance_of(n)} | {""}
    again = validation.observe(graph, places)[0]
    assert all(torch.equal(value, again[at]) for at, value in found[0].items())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert random.getstate() == python
    assert tensors(graph) == before
    assert all(a is b for a, b in zip(objects, [*graph.parameters(), *graph.buffers()], strict=True))
    assert torch.equal(x, X)
    fold(graph, verify=x)
    assert torch.equal(graph.seen, torch.zeros(()))
    assert {float(site.steering.coeff) for site in sites(graph).values()} == {0.5}
    assert not any(site.core.g.any() for site in sites(graph).values())


def test_noise_stands_for_the_cores_and_another_coefficient():
    """At identity a broken adapter gives what a whole one does: only noise shows the fault."""
    graph = set_coeff(graph_of(), 0.0)
    zero = graph(X)
    places = {n.name: provenance_of(n).key for n in graph.graph.nodes if (m := provenance_of(n)) and m.role == "base"}
    set_coeff(graph, 1.0)
    for site in sites(graph).values():
        site.core.g.data.zero_()
    validation = Validation(((X,), {}))
    assert torch.equal(graph(X), zero)
    assert not torch.allclose(validation.observe(graph, places)[0][""], zero, atol=1e-3)
    frozen = [name for name, _ in [*graph.named_parameters(), *graph.named_buffers()]]
    assert torch.equal(validation.observe(graph, places, frozen=frozen)[0][""], zero)


def test_a_fault_at_identity_is_refused(monkeypatch):
    model = apply_surgery(chain(), "antipasto", r=8, example_inputs=X, progress=False)
    after(monkeypatch, Insert, transposed("factors.U"))
    assert torch.equal(to_graph(model, X)(X), model(X))
    with refused("insert"):
        to_graph(model, X, verify=True)


def test_random_inputs_are_like_the_example():
    ids, mask = torch.tensor([[3, 9, 9], [40, 0, 3]]), torch.tensor([[True, True, False], [True, False, False]])
    half = torch.randn(4, 5).bfloat16() * 100
    call = ((ids, {"half": half, "none": None}), {"mask": mask, "n": 3, "empty": torch.empty(0, 2)})
    first, *others = Validation(call, random=3).calls
    assert first is call
    assert len(others) == 3
    for args, kwargs in others:
        assert (args[0].dtype, args[0].shape) == (ids.dtype, ids.shape)
        assert sorted(args[0].flatten().tolist()) == sorted(ids.flatten().tolist())
        assert (args[1]["half"].dtype, args[1]["half"].shape) == (half.dtype, half.shape)
        assert not torch.equal(args[1]["half"], half)
        assert 30 < args[1]["half"].float().std() < 300
        assert args[1]["none"] is None
        assert kwargs["mask"].dtype == torch.bool
        assert kwargs["mask"].sum() == mask.sum()
        assert kwargs["n"] == 3
        assert kwargs["empty"].shape == (0, 2)
    again = Validation(call, random=3).calls
    assert torch.equal(again[2][0][0], others[1][0][0])
    assert not torch.equal(others[0][0][1]["half"], others[1][0][1]["half"])


def test_the_error_is_told():
    compiled = surgery.verbs.graph.pipeline(operated(), X, form="residual", verify=True)
    errors = {stage.name: stage.error for stage in compiled.stages if stage.name in STAGES}
    assert list(errors) == list(STAGES)
    assert all(0 < error < 1e-5 for error in errors.values())
    assert all(stage.error is None for stage in surgery.verbs.graph.pipeline(operated(), X, form="residual").stages)
