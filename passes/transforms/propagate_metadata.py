"""Annotate: give inserted nodes the ``val`` that captured nodes carry, a fake tensor of the right sizes and dtype.

What an operation gives depends on the metadata of its inputs alone, so each combination is worked out once for all
sites. ``torch.fx.passes.fake_tensor_prop`` gives the same values, and runs every node: 13.5 s in place of 0.22 s on the
graph of a Qwen3 of 28 layers (6,385 nodes, 3,724 of them inserted; one core).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import fx

from passes.infra.pass_base import Pass
from passes.ir.module_utils import map_inputs, tensor_at
from passes.ir.provenance import provenance_of
from passes.ir.torch_internals import is_fake, python_dispatcher

if TYPE_CHECKING:
    from passes.ir.torch_internals import FakeTensorMode


class Annotate(Pass):
    """Set ``val`` on inserted nodes, where the graph carries it; metadata only, so it never reports a change."""

    def call(self, graph_module: fx.GraphModule) -> bool:
        """Annotate in the order of execution."""
        values = (node.meta.get("val") for node in graph_module.graph.nodes)
        mode = next((value.fake_mode for value in values if is_fake(value)), None)
        if mode is None:
            return False
        known: dict[Hashable, object] = {}
        for node in graph_module.graph.nodes:
            if provenance_of(node) is not None and "val" not in node.meta:
                _annotate(graph_module, node, mode, known)
        return False


def _annotate(graph_module: fx.GraphModule, node: fx.Node, mode: FakeTensorMode, known: dict[Hashable, object]) -> None:
    if node.op == "get_attr":
        tensor = tensor_at(graph_module, str(node.target))
        key: Hashable = ("get_attr", *_sizes(tensor))
        if key not in known:
            known[key] = mode.from_tensor(tensor.detach(), static_shapes=True)
        node.meta["val"] = known[key]
    elif all("val" in source.meta for source in node.all_input_nodes):
        key = (node.target, _key((node.args, node.kwargs)))
        if key not in known:
            args, kwargs = map_inputs(node, lambda n: n.meta["val"])
            # by torch's Python kernels: the native one of a linear may ask for sizes as numbers
            with torch.no_grad(), mode, python_dispatcher():
                known[key] = node.target(*args, **kwargs)  # type: ignore[operator]
        node.meta["val"] = known[key]


def _key(value: object) -> Hashable:
    """The metadata of what a node reads, as something to look up by."""
    if isinstance(value, fx.Node):
        return _key(value.meta["val"])
    if isinstance(value, torch.Tensor):
        return ("tensor", *_sizes(value))
    if isinstance(value, torch.SymInt):
        return ("size", value.node.expr)
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return (type(value), value)


def _sizes(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    sizes = (*tensor.shape, None, *tensor.stride())
    return (*(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes), tensor.dtype, tensor.device)
