"""Everything of torch whose name begins with an underscore, and that these packages use: the one file to look through
when a torch release moves something. ``tests/contracts/test_torch_internals.py`` keeps it the only one.

What takes long to import (sympy, the inductor) is imported where it is called for.
"""

from __future__ import annotations

import contextlib
import copy
import re
from typing import Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten_with_path, tree_iter, tree_leaves, tree_map, tree_map_only

__all__ = [
    "Convolution",
    "HigherOrderOperator",
    "OpOverload",
    "TorchDispatchMode",
    "tree_flatten_with_path",
    "tree_iter",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
]

Convolution = nn.modules.conv._ConvNd  # the base of all convolutions, transposed ones included


def graph_like(graph: fx.Graph) -> fx.Graph:
    """An empty graph with another's tracer."""
    return fx.Graph(tracer_cls=graph._tracer_cls)


def copy_signature(source: fx.Graph, target: fx.Graph) -> None:
    """Let a graph take its inputs and give its outputs in another's structure (a pytree, for a graph of ``export``)."""
    target._codegen = copy.copy(source._codegen)


def is_erased(node: fx.Node) -> bool:
    """Whether a node was erased from its graph."""
    return node._erased


def schema_of(target: Any) -> Any:
    """The schema of an ATen overload; None for anything else."""
    return getattr(target, "_schema", None)


def storage_address(tensor: torch.Tensor) -> int:
    """What tells a storage from all others that are alive."""
    return int(tensor.untyped_storage()._cdata)


def is_fake(value: Any) -> bool:
    """Whether a value is a fake tensor."""
    from torch._subclasses import FakeTensor

    return isinstance(value, FakeTensor)


def fake_mode_with_symbols() -> Any:
    """A fake tensor mode whose sizes may be symbols."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv())


def python_dispatcher() -> contextlib.AbstractContextManager[Any]:
    """Run operations by torch's Python kernels: native ones may ask for symbolic sizes as numbers."""
    from torch._dispatch.python import enable_python_dispatcher

    manager: contextlib.AbstractContextManager[Any] = enable_python_dispatcher()
    return manager


_ENTRY = re.compile(r"\b_(?:modules|parameters|buffers)\['([^']+)'\]")


def dynamo_source(node: fx.Node) -> tuple[str, str] | None:
    """The root and the path of the module's tensor that a placeholder of Dynamo's stands for; None for any other.

    Dynamo names a source ``L['self']._modules['lin']._parameters['weight']``: the root is ``L['self']``, and the path
    ``lin.weight``.
    """
    source = getattr(node.meta.get("grapharg"), "source", None)
    name: Any = getattr(source, "name", None)
    text = str(name() if callable(name) else name)  # a method until torch 2.12
    path = _ENTRY.findall(text)
    return (_ENTRY.split(text)[0].rstrip("."), ".".join(path)) if path else None
