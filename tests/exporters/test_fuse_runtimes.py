"""Fused graphs kept, compiled, exported and captured again; odd graphs; the specification."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
import torch._dynamo.testing
from torch import fx, nn

import surgery
from exporters import export
from passes.errors import PassError
from passes.infra.dialect import check_graph
from passes.infra.pass_manager import run_pipeline
from passes.ir.provenance import provenance_of
from passes.transforms.fuse_projections import Fuse, StackedRows
from passes.transforms.merge_adapters import Merge
from surgery import apply_surgery, fold, fuse, load_adapter, save_adapter, set_coeff, sites, steer, to_graph
from surgery.hosting.state import record_of
from tests.support.fused_graphs import aten, block, graphs, holders, operated, products, run, trained
from tests.support.onnx_models import session
from tests.support.tolerance import assert_close


def test_undo_is_bit_for_bit():
    model, x = operated()
    plain, fused = to_graph(model, x), to_graph(model, x)
    names, base = [n.name for n in record_of(plain).original.graph.nodes], surgery.undo_surgery(plain)
    fold(fuse(fused))
    surgery.undo_surgery(fused)
    assert [n.name for n in fused.graph.nodes] == names
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in base.named_modules()]
    expected, found = base.state_dict(), fused.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(run(fused, x), run(base, x))
    assert not any(provenance_of(node) for node in fused.graph.nodes)


def test_save_and_load(tmp_path):
    plain, fused, x = graphs()
    one, other = save_adapter(plain, tmp_path / "plain"), save_adapter(fused, tmp_path / "fused")
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()
    model, _ = block()
    assert_close(run(load_adapter(model, other), x), run(fused, x))
    assert_close(run(load_adapter(fused, one), x), run(plain, x))
    assert holders(fused) == []  # other adapters, on the graph before surgery
    fuse(fused, verify=x)
    assert_close(run(fused, x), run(plain, x))


def test_the_factors_are_stored_once():
    model, x = operated()
    before = {key: site.factors.Vh.clone() for key, site in sites(model).items()}
    own = {key: site.factors.Vh.data_ptr() for key, site in sites(model).items()}
    graph = to_graph(model, x, fuse=True)
    assert {key: site.factors.Vh.data_ptr() for key, site in sites(model).items()} == own  # the model's own stay
    for copied in (graph, copy.deepcopy(graph), copy.deepcopy(graph).to("cpu", torch.float64)):
        for rows in holders(copied):
            for module, name in rows.parts:
                assert module in set(copied.modules())
                assert module.get_buffer(name).untyped_storage().data_ptr() == rows.rows.untyped_storage().data_ptr()
        for key, site in sites(copied).items():
            assert torch.equal(site.factors.Vh.to(before[key]), before[key])
        if copied is not graph:
            assert not {r.rows.data_ptr() for r in holders(copied)} & {r.rows.data_ptr() for r in holders(graph)}
            assert_close(run(copied, x.to(copied.q.weight.dtype)), run(graph, x), torch.float32)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts(assign, tmp_path):
    plain, fused, x = graphs()
    assert list(fused.state_dict()) == list(plain.state_dict())
    safetensors.torch.save_file(fused.state_dict(), tmp_path / "a.safetensors")
    state = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    state = {n: 2 * t if "factors.Vh" in n else t for n, t in state.items()}
    for graph in (plain, fused):
        graph.load_state_dict(copy.deepcopy(state), assign=assign)
    assert_close(run(fused, x), run(plain, x))
    for rows in holders(fused):
        for module, name in rows.parts:
            assert module.get_buffer(name).untyped_storage().data_ptr() == rows.rows.untyped_storage().data_ptr()


def test_a_failed_fuse_leaves_the_graph_as_it_was(monkeypatch):
    graph, _, x = graphs()
    nodes, tensors = graph.graph, {key: site.factors.Vh for key, site in sites(graph).items()}
    monkeypatch.setattr(
        StackedRows, "bounds", lambda self, right=StackedRows.bounds: [(0, stop - start) for start, stop in right(self)]
    )
    with pytest.raises(PassError, match="'fuse' changed what the model computes, first at site"):
        fuse(graph, verify=x)
    assert graph.graph is nodes
    assert holders(graph) == []
    assert all(site.factors.Vh is tensors[key] for key, site in sites(graph).items())


def test_compiled_without_recompilation():
    _, fused, x = graphs()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, backend=counter, fullgraph=True)
    for coeff in (1.0, 0.0, -0.7, 2.0):
        set_coeff(fused, coeff)
        assert_close(run(compiled, x), run(fused, x))
    assert counter.frame_count == 1
    for shift in (0.0, 0.5, -1.0):
        set_coeff(fused, torch.linspace(-1, 1, 4) + shift)
        assert_close(run(compiled, x), run(fused, x))
    assert counter.frame_count == 2


@pytest.mark.parametrize("folded", [pytest.param(False, marks=pytest.mark.full), True])
def test_onnx(folded, tmp_path):
    plain, fused, x = graphs()
    if folded:
        fold(fused)
    for mode in ("merged", "live"):
        report = export(fused, "onnx", tmp_path / f"{mode}.onnx", mode=mode, example_inputs=x)
        assert 0 <= report.max_error < 1e-5
    running = session(tmp_path / "live.onnx")
    for coeff in (np.array(-0.5, np.float32), np.array([2.0], np.float32)):
        (found,) = running.run(None, {"x": x.numpy(), "coeff": coeff})
        assert_close(torch.from_numpy(found), run(set_coeff(plain, torch.from_numpy(coeff)), x))


def test_a_graph_of_a_fused_graph():
    _, fused, x = graphs()
    again = to_graph(fused, x)
    assert holders(again) == []
    assert_close(run(again, x), run(fused, x))
    assert len(holders(to_graph(fused, x, fuse=True))) == 2
    assert len(holders(fused)) == 2


def test_the_pipeline_with_and_without():
    model, x = operated()
    compiled = surgery.pipeline(model, x, form="residual", fuse=True, verify=True, debug=True)
    assert [(s.name, s.modified) for s in compiled.stages[:4]] == [
        (n, True) for n in ("insert", "fold", "fuse", "merge")
    ]
    assert (sites(compiled.graph), holders(compiled.graph)) == ({}, [])
    for form in ("delta", "residual"):
        graph = surgery.pipeline(model, x, form=form, fuse=True, stop_after="fuse", verify=True).graph
        assert products(graph) == 18
        assert_close(run(graph, x), run(model, x))
    with pytest.raises(surgery.InputError, match="needs form='delta'"):
        to_graph(model, x, form="residual", fuse=True)
    with pytest.raises(surgery.InputError, match="use to_graph first"):
        fuse(model)
    residual = to_graph(model, x, form="residual")
    assert not Fuse().run(residual).modified


def test_chosen_sites():
    plain, _, x = graphs()
    live = run(plain, x)
    assert Fuse(["q", "k", "up"]).run(plain, debug=True).modified
    assert [sorted(rows.bounds()) for rows in holders(plain)] == [[(0, 7), (7, 12)]] or products(plain) == 20
    assert products(plain) == 20
    assert_close(run(plain, x), live)
    assert Fuse().run(plain).modified  # gate and up; v is alone
    assert products(plain) == 19
    assert_close(run(plain, x), live)
    with pytest.raises(PassError, match="site 'nothing' is not in the graph"):
        Fuse(["nothing"]).run(plain)


def test_values_of_nodes_are_annotated():
    _, fused, _ = graphs()
    wide = [
        n
        for n in fused.graph.nodes
        if provenance_of(n) and provenance_of(n).role == "shared" and n.op == "call_function"
    ]
    assert sorted(n.meta["val"].shape[-1] for n in wide) == [14, 18]
    assert all("val" in n.meta for n in fused.graph.nodes if provenance_of(n) is not None)


class Odd(nn.Module):
    """Modules called more than once, and an input that is written to in between."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, (self.a, self.b, self.c) = kind, (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "all twice":
            y = self.a(x) * self.b(x)
            return self.b(y) + self.a(y) + self.c(x)
        if self.kind == "one twice":
            return self.b(self.a(x) + self.b(x)) + self.c(x)
        if self.kind == "same input":
            return self.a(x) * self.b(x) + self.a(x)
        x = x * 1.0
        y = self.a(x)
        x.mul_(2.0)
        return y + self.b(x) * self.c(x)


@pytest.mark.parametrize(
    ("kind", "saved", "rows"),
    [("all twice", 2, [10]), ("one twice", 1, [10]), ("same input", 2, [10]), ("written", 1, [10])],
)
def test_odd_graphs(kind, saved, rows):
    torch.manual_seed(0)
    model, x = Odd(kind).eval(), torch.randn(3, 4, 12)
    apply_surgery(model, "antipasto", r=5, example_inputs=x, progress=False)
    plain = to_graph(trained(model), x)
    fused = to_graph(model, x, fuse=True, verify=True, debug=True)
    assert products(plain) - products(fused) == saved
    assert [len(r.rows) for r in holders(fused)] == rows
    for coeff in (1.0, -0.5, torch.tensor([1.0, 0.0, -1.0])):
        assert_close(run(set_coeff(fused, coeff), x), run(set_coeff(plain, coeff), x))
    set_coeff(fused, 1.0)
    fold(fused, verify=x, debug=True)
    set_coeff(plain, 1.0)
    assert_close(run(fused, x), run(plain, x))


def test_only_equal_dtypes_fuse():
    model, x = block()
    for name, dtype in (("q", torch.float64), ("k", torch.float64), ("v", torch.float32)):
        config = surgery.AntiPaSTO(r=5, factors_dtype=dtype)
        apply_surgery(model, config, target_modules=[name], example_inputs=x, progress=False)
    graph = to_graph(trained(model), x, fuse=True, verify=True, debug=True)
    (rows,) = holders(graph)
    assert (rows.rows.dtype, len(rows.rows)) == (torch.float64, 10)
    live = run(model, x)
    assert_close(run(graph, x), live)
    assert_close(run(fold(graph, verify=x, debug=True), x), live)


def test_a_traced_model_fuses():
    model, x = block()
    graph = apply_surgery(fx.symbolic_trace(model), "antipasto", r=5, progress=False)
    live = run(trained(graph), x)
    fuse(graph, verify=x, debug=True)
    assert len(holders(graph)) == 2
    assert_close(run(graph, x), live)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(surgery.undo_surgery(graph), x), run(block()[0], x))


def test_the_specification_knows_what_is_shared():
    _, fused, _ = graphs()
    wide = next(n for n in fused.graph.nodes if n.name.endswith("fused_0_wide"))
    with fused.graph.inserting_after(wide):
        fused.graph.call_function(aten.neg.default, (wide,))
    assert any("which is none of theirs" in problem for problem in check_graph(fused))


def test_a_pipeline_of_passes_alone():
    graph, _, x = graphs()
    live = run(graph, x)
    weights = {key: site.merged_weight() for key, site in sites(graph).items()}
    assert [r.modified for r in run_pipeline(graph, [Fuse(), Fuse(), Merge(weights)])] == [True, False, True]
    assert_close(run(graph, x), live)


def test_steering_within_a_block():
    plain, fused, x = graphs()
    with steer(plain, 0.3), steer(fused, 0.3):
        assert_close(run(fused, x), run(plain, x))
    assert_close(run(fused, x), run(plain, x))
