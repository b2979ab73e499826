"""The operations of one forward as a graph, for a model that no capture takes: what it did, whatever decided it.

The graph holds what ran on these inputs: the branches that were taken, the experts that were hit. It is read by the
same rules as a captured one, and never run.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.fx.node import Argument
from torch.utils.weak import WeakIdKeyDictionary

from passes.capture.module_calls import ModuleStack
from passes.ir.forward_context import Call, copied, inference_mode_of, state_kept
from passes.ir.torch_internals import OpOverload, put_graph, tree_map

BASE_TYPES = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def trace_run(model: nn.Module, call: Call) -> fx.GraphModule:
    """Run a model once, in eval mode without gradients, and give its operations as a graph for reading.

    Its ``get_attr`` targets are the model's own parameter names. The model is left as it was.
    """
    tracer = _RunTracer(model)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with state_kept(model), inference_mode_of(model), torch.no_grad(), tracer.running():
            args, kwargs = copied(call)
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    trace = fx.GraphModule(model, fx.Graph())
    put_graph(trace, tracer.graph)
    return trace


class _RunTracer(ModuleStack):
    """Writes every ATen operation down as a node."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.graph = fx.Graph()
        self.nodes: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.names = {id(p): name for name, p in reversed([*model.named_parameters(remove_duplicate=False)])}

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(func, OpOverload):
            node = self.graph.call_function(func, *tree_map(self._operand, (args, kwargs)))
            path = next((self.paths[id(m)] for m in reversed(self.stack) if id(m) in self.paths), "")
            node.meta["nn_module_stack"] = {path: (path, nn.Module)}
            self._note(out, node)
        return out

    def _operand(self, value: object) -> Argument:
        """The node of a tensor: what gave it, the parameter that it is, or an input where it came from elsewhere."""
        if not isinstance(value, torch.Tensor):
            return value if isinstance(value, BASE_TYPES) else None
        if value not in self.nodes:
            name = self.names.get(id(value))
            if name is None:
                self.nodes[value] = self.graph.placeholder(f"x_{len(self.nodes)}")
            else:
                self.nodes[value] = self.graph.get_attr(name)
        node: fx.Node = self.nodes[value]
        return node

    def _note(self, out: object, node: fx.Node) -> None:
        if isinstance(out, torch.Tensor):
            self.nodes[out] = node
        elif isinstance(out, (tuple, list)):
            for i, part in enumerate(out):
                self._note(part, self.graph.call_function(operator.getitem, (node, i)))
