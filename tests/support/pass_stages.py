"""One model after each stage of the pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from passes.ir.provenance import provenance_of
from surgery import apply_surgery, set_coeff, sites, to_graph
from tests.support.zoo import built_once

KEYS = ["0", "2", "4"]
STAGES = ("insert", "fold", "merge")
X = torch.linspace(-2, 2, 24).sin().reshape(3, 8)


def chain() -> nn.Module:
    """Square layers, so that no fault shows in a shape."""
    torch.manual_seed(1)
    layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)]
    return nn.Sequential(*layers).eval()


@built_once
def operated(r: int = 8) -> nn.Module:
    model = apply_surgery(chain(), "antipasto", r=r, example_inputs=X, progress=False)
    torch.manual_seed(2)
    for site in sites(model).values():
        site.core.g.data.normal_()
    return set_coeff(model, 0.9)


@built_once
def graph_of(form: str = "delta", **options: Any) -> fx.GraphModule:
    return to_graph(operated(), X, form=form, **options)


def nodes_at(graph: fx.GraphModule, key: str) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if (provenance := provenance_of(node)) and provenance.key == key]


def named(graph: fx.GraphModule, key: str, ending: str) -> fx.Node:
    found = [node for node in nodes_at(graph, key) if node.op == "get_attr" and str(node.target).endswith(ending)]
    assert found, ending
    return found[0]


def after(monkeypatch: pytest.MonkeyPatch, cls: type, fault: Any) -> None:
    """Let a pass do what it does, and then a fault to the graph."""
    call = cls.call

    def broken(self: Any, graph_module: fx.GraphModule) -> bool:
        modified = call(self, graph_module)
        fault(graph_module)
        return modified

    monkeypatch.setattr(cls, "call", broken)


def between(node: fx.Node, target: Any, *args: Any) -> None:
    """Put an operation between a node and its readers."""
    readers = list(node.users)
    with node.graph.inserting_before(node.next):
        new = node.graph.call_function(target, (node, *args))
    new.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, new)
