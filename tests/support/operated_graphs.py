"""Models of the zoo as FX graphs of every dialect, before and after surgery."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from passes.capture.capture import export_program, forward_call
from surgery import apply_surgery, sites
from surgery.hosting.model_kinds import as_module
from tests.support.model_state import State, state_of
from tests.support.operated_models import randomise
from tests.support.zoo import SmallModel, small_model

HUB = ("gpt2", "qwen3", "bert")


class Spellings(nn.Module):
    """Products in every spelling: ``x @ w``, functional and ``addmm`` with keywords, a method, modules, one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 16) / 4)
        self.v = nn.Parameter(torch.randn(16, 16) / 4)
        self.a = nn.Parameter(torch.randn(16, 16) / 4)
        self.b = nn.Parameter(torch.randn(16) / 4)
        self.m = nn.Parameter(torch.randn(16, 16) / 4)
        self.twice = nn.Linear(16, 16)
        self.block = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x @ self.w)
        h = h + torch.tanh(F.linear(weight=self.v, input=h, bias=self.b))
        h = torch.tanh(torch.addmm(input=self.b, mat1=h, mat2=self.a))
        h = torch.tanh(h.matmul(self.m.t()))
        return self.block(self.twice(torch.relu(self.twice(h))))


def spellings() -> SmallModel:
    torch.manual_seed(0)
    return SmallModel("spellings", Spellings().eval(), torch.randn(4, 12))


def dynamo(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    return torch._dynamo.export(model)(x).graph_module


DIALECTS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "symbolic": lambda model, x: fx.symbolic_trace(model),
    "exported": lambda model, x: torch.export.export(model, (x,)).module(),
    "program": lambda model, x: torch.export.export(model, (x,)),
    "dynamo": dynamo,
    "traced": lambda model, x: torch.jit.trace(model, x),
    "scripted": lambda model, x: torch.jit.script(model),
}
HUB_MODELS = tuple(pytest.param(name, marks=pytest.mark.full) for name in HUB)
each_graph = pytest.mark.parametrize("name", ["symbolic", "exported", "dynamo", HUB_MODELS[0]])


def source(name: str, dtype: torch.dtype = torch.float32) -> SmallModel:
    """The model that a graph is made of."""
    if name in HUB:
        return small_model(name, dtype)
    found = spellings()
    return SmallModel(name, found.model.to(dtype), found.inputs.to(dtype))


@functools.cache
def _exported(name: str, dtype: torch.dtype) -> fx.GraphModule:
    found = small_model(name, dtype)
    return export_program(found.model, forward_call(found.inputs)).module()


def graph(name: str, dtype: torch.dtype = torch.float32) -> SmallModel:
    """A graph module; what is no graph yet is given as it is."""
    if name in HUB:
        return SmallModel(name, copy.deepcopy(_exported(name, dtype)), small_model(name, dtype).inputs)
    found = source(name, dtype)
    return SmallModel(name, DIALECTS[name](found.model, found.inputs), found.inputs)


def base(name: str, dtype: torch.dtype = torch.float32) -> SmallModel:
    """The graph that surgery starts from, its weights frozen."""
    found = graph(name, dtype)
    found.model = as_module(found.model, found.inputs)
    found.model.requires_grad_(False)
    return found


def operate(found: SmallModel, **options: Any) -> SmallModel:
    options = {"variant": "antipasto", "r": 6, "example_inputs": found.inputs, "progress": False, **options}
    result = apply_surgery(found.model, **options)
    assert result is found.model or not isinstance(found.model, fx.GraphModule)
    return SmallModel(found.name, result, found.inputs)


def operated(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> SmallModel:
    """A graph module after surgery, its cores at random values."""
    found = operate(graph(name, dtype), **options)
    randomise(found.model)
    return found


def in_place(name: str, dtype: torch.dtype = torch.float32) -> SmallModel:
    """The source, operated on in place, with the very sites of the graph."""
    keys = sorted(sites(operated(name).model))
    return operate(source(name, dtype), target_modules=keys)


def graph_state(model: fx.GraphModule) -> State:
    """Everything of a graph module that undoing brings back: the graph object, its nodes and code, and the module."""
    state = state_of(model)
    state.held += [model.graph, *model.graph.nodes]
    state.append(f"{id(model.graph)} {id(model.graph.owning_module)} {model.code}")
    state.extend(f"{id(n)} {n.name} {n.target} {n.args} {n.kwargs} {sorted(n.meta)}" for n in model.graph.nodes)
    state.append(str(list(model.state_dict())))
    return state


def shape_of(graph_: fx.Graph) -> list[tuple[str, str]]:
    return [(node.op, node.name) for node in graph_.nodes]
