"""What a node of a graph computes, by an interpreter that knows nothing of adapters."""

from __future__ import annotations

import torch
from torch import fx


def value_at(graph: fx.GraphModule, name: str, x: torch.Tensor) -> torch.Tensor:
    """The value of a node, by its name, for an input of the graph."""
    found: dict[str, torch.Tensor] = {}

    class Reader(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            found[n.name] = value = super().run_node(n)
            return value

    with torch.no_grad():
        Reader(graph).run(x.clone())
    return found[name]
