"""A graph as text, and the tensors of a program."""

from __future__ import annotations

from typing import Any

from torch import fx, nn


def listing(graph: fx.GraphModule) -> list[tuple[str, ...]]:
    return [(n.op, str(n.target), n.name, str(n.args), str(n.kwargs)) for n in graph.graph.nodes]


def tensors(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: (id(t), t.requires_grad, str(t.detach().tolist())) for name, t in named}
