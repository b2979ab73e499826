"""The executable dialect: an operated graph keeps every rule, and a graph that breaks one is told so."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from passes.errors import PassError
from passes.infra import dialect as spec
from passes.infra.pass_base import Pass, PassResult
from passes.ir.provenance import KEY, adapter_instances, clear_provenance, provenance_of, set_provenance
from surgery import apply_surgery, fold, sites


def operated() -> fx.GraphModule:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return apply_surgery(fx.symbolic_trace(model), "antipasto", r=3, progress=False)


def body(graph: fx.GraphModule, key: str = "0") -> list[fx.Node]:
    return [n for n in adapter_instances(graph.graph, [key])[0].nodes if provenance_of(n).role == "body"]


def call(graph: fx.GraphModule, target: object) -> fx.Node:
    return next(node for node in body(graph) if node.target is target)


def test_an_operated_graph_keeps_every_rule():
    graph = operated()
    assert spec.check_graph(graph) == []
    fold(graph, debug=True)
    assert spec.check_graph(graph) == []


def test_every_rule_has_a_reason_to_be():
    assert len(spec.RULES) == len({rule.__name__ for rule in spec.RULES}) == 9
    assert all(rule.__doc__ for rule in spec.RULES)


def second_output(graph):
    with graph.graph.inserting_before(next(iter(graph.graph.nodes)).next):
        graph.graph.create_node("output", "output", (None,))


def same_name(graph):
    first, second = list(graph.graph.nodes)[:2]
    second.name = first.name


def reads_later(graph):
    node = body(graph)[0]
    next(iter(graph.graph.nodes)).append(adapter_instances(graph.graph, ["2"])[0].out)
    assert node.graph is graph.graph


def lost_attribute(graph):
    next(n for n in body(graph) if n.op == "get_attr").target = "sspace.0.factors.nothing"


def no_module(graph):
    next(n for n in graph.graph.nodes if n.op == "call_module").target = "nowhere"


def python_function(graph):
    call(graph, torch.ops.aten.elu.default).target = torch.nn.functional.elu


def mutation(graph):
    call(graph, torch.ops.aten.elu.default).target = torch.ops.aten.elu_.default


def dead_node(graph):
    with graph.graph.inserting_before(body(graph)[-1]):
        new = graph.graph.get_attr("sspace.0.factors.U")
    set_provenance(new, provenance_of(body(graph)[0]))


def no_output(graph):
    clear_provenance(adapter_instances(graph.graph, ["0"])[0].out)


def no_adapter(graph):
    for node in adapter_instances(graph.graph, ["0"])[0].nodes:
        set_provenance(node, provenance_of(node)._replace(path="1"))


def reads_nothing(graph):
    for node in adapter_instances(graph.graph, ["0"])[0].nodes:
        if node.op == "get_attr":
            clear_provenance(node)


def wrong_role(graph):
    node = body(graph)[0]
    set_provenance(node, provenance_of(node)._replace(role="guest"))


def no_provenance(graph):
    body(graph)[0].meta["custom"] = {KEY: "sspace.0"}


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (second_output, "one output at the end"),
        (same_name, "nodes are named"),
        (reads_later, "does not stand before it"),
        (lost_attribute, "'sspace.0.factors.nothing', which does not exist"),
        (no_module, "calls 'nowhere', which is no module"),
        (python_function, "no ATen overload"),
        (mutation, "writes to a tensor"),
        (dead_node, "is dead"),
        (no_output, "lacks its 'out' node"),
        (no_adapter, "'1' is no adapter"),
        (reads_nothing, "reads nothing of its adapter"),
        (wrong_role, "has the role 'guest'"),
        (no_provenance, "has 'sspace.0' for its provenance"),
    ],
)
def test_a_broken_rule_is_named(harm, expected):
    graph = operated()
    harm(graph)
    assert any(expected in problem for problem in spec.check_graph(graph)), spec.check_graph(graph)


def test_debug_mode_checks_after_every_pass(monkeypatch):
    class Harm(Pass):
        def call(self, graph_module):
            dead_node(graph_module)
            return True

    assert isinstance(Harm().run(operated()), PassResult)
    with pytest.raises(PassError, match=r"'harm' left a graph outside of the dialect: site '0'.*is dead"):
        Harm().run(operated(), debug=True)
    monkeypatch.setenv("SURGERY_DEBUG", "1")
    with pytest.raises(PassError, match="is dead"):
        Harm().run(operated())
    monkeypatch.setenv("SURGERY_DEBUG", "0")
    assert sites(Harm().run(operated()).graph_module)
