"""Provenance outlives what torch does to a graph: copies, exports, AOTAutograd, files; an old one is no obstacle."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

from passes.infra.dialect import check_graph
from passes.ir.provenance import KEY, Provenance, adapter_instances, clear_provenance, provenance_of, set_provenance
from surgery import apply_surgery, sites, to_graph, undo_surgery
from tests.support.zoo import built_once

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x):
        return self.up(x) * self.gate(x)


@built_once
def operated(form: str = "delta", *, fuse: bool = False) -> fx.GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(Gated() if fuse else nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    apply_surgery(model, "antipasto", r=3, example_inputs=X, progress=False)
    return to_graph(model, X, form=form, fuse=fuse)


def roles(graph: fx.Graph) -> list[tuple[str, str]]:
    """Site and role of each operation that has any, in order."""
    found = [(node, provenance_of(node)) for node in graph.nodes if node.op == "call_function"]
    return [(p.key, p.role) for _, p in found if p is not None]


@pytest.mark.parametrize("form", ["delta", "residual"])
def test_an_export_and_its_copies_keep_it(form):
    graph = operated(form)
    expected = roles(graph.graph)
    assert {key for key, _ in expected} == {"0", "2"}
    program = torch.export.export(graph, (X,), strict=False)
    again = torch.export.export(program.module(), (X,), strict=False)
    for other in (program, again):
        kept = roles(other.graph)
        # a size that is a number now is no operation
        assert [item for item in expected if item in kept] == expected
        assert set(kept) == set(expected)
        assert len(adapter_instances(other.graph)) == 2
    assert roles(copy.deepcopy(graph).graph) == expected
    assert roles(copy.deepcopy(program.module()).graph) == roles(program.module().graph)


def test_a_saved_program_keeps_it():
    program = torch.export.export(operated(), (X,), strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert roles(loaded.graph) == roles(program.graph)
    assert {instance.provenance.path for instance in adapter_instances(loaded.graph)} == {"sspace.0", "sspace.2"}


def test_aot_autograd_keeps_it():
    seen = []

    def compiler(graph_module, _):
        seen.append(graph_module.graph)
        return graph_module.forward

    graph = operated()
    torch.compile(graph, backend=aot_autograd(fw_compiler=compiler))(X)
    assert set(roles(seen[0])) == set(roles(graph.graph))


@pytest.mark.parametrize("fuse", [False, True])
def test_a_graph_that_was_traced_again_can_be_operated_on(fuse):
    graph = operated(fuse=fuse)
    module = torch.export.export(graph, (X,), strict=False).module()
    old, before = module.graph, roles(module.graph)
    assert before
    output = module(X)
    apply_surgery(module, "antipasto", r=2, target_modules=["2"], progress=False)
    assert check_graph(module) == []
    assert {instance.provenance.key for instance in adapter_instances(module.graph)} == set(sites(module))
    assert torch.equal(module(X), output)
    undo_surgery(module)
    assert module.graph is old
    assert roles(module.graph) == before


def test_other_custom_metadata_is_left_alone():
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(6, 8)))
    node, provenance = next(iter(graph.graph.nodes)), Provenance("0", "sspace.0", "_0", "body", "delta", "input")
    shared = node.meta["custom"] = {"stream": 1}
    set_provenance(node, provenance)
    assert node.meta["custom"] == {"stream": 1, KEY: provenance}
    assert shared == {"stream": 1}  # copies of a graph share the dict
    clear_provenance(node)
    assert node.meta["custom"] == shared
    del node.meta["custom"]
    set_provenance(node, provenance)
    clear_provenance(node)
    assert node.meta == {}
