"""Parameters that are placeholders: in the graph that ``torch.compile`` gives a backend, in an ``ExportedProgram``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import fx, nn

from passes.analysis.linear_sites import sites_from_graph
from passes.capture.capture import capture, normalised
from passes.capture.inspect_model import inspect_model
from passes.ir.parameter_names import name_placeholders, placeholder_parameters, tensor_name, unwritable
from surgery import apply_surgery
from surgery.errors import TargetError

T = TypeVar("T")
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block, a raw parameter, a stack, a product of activations, and a buffer that is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.layers = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 6, bias=False)])
        self.raw = nn.Parameter(torch.randn(6, 5))
        self.stack = nn.Parameter(torch.randn(2, 5, 4))
        self.register_buffer("mask", torch.ones(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.layers[0](torch.relu(self.up(x)))
        x = x @ self.mask
        y = x @ self.raw
        return torch.bmm(y.expand(2, *y.shape), self.stack).sum(0) @ (y.T @ y)[:4, :4]


def in_backend(model: Any, look: Callable[[fx.GraphModule, tuple[Any, ...]], T]) -> T:
    """What a function sees that is called in a backend, with the graph and the example inputs."""
    taken: list[T] = []

    def backend(graph_module: fx.GraphModule, example_inputs: Any) -> Any:
        taken.append(look(graph_module, tuple(example_inputs)))
        return graph_module

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(X)
    return taken[0]


def told(sites: Any) -> list[tuple[Any, ...]]:
    return [(s.key, s.weight, s.bias, s.layout, s.d_out, s.d_in, s.stack, s.residual) for s in sites]


def test_sites_of_a_backend_are_those_of_the_model():
    model, graphs = Block(), []

    def look(graph: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
        assert not list(graph.parameters())
        graphs.append(graph)
        before = [dict(node.meta) for node in graph.graph.nodes]
        found = inspect_model(graph), inspect_model(graph, inputs)
        assert [dict(node.meta) for node in graph.graph.nodes] == before  # it is read, not written
        return found

    reference = inspect_model(model, X)
    for found in in_backend(model, look):
        assert told(found.sites) == told(reference.sites)
        assert [s.key for s in found.sites] == ["up", "layers.0", "raw", "stack"]
        assert {s.reason for s in found.skipped} >= {"both operands are activations"}
    assert len(inspect_model(graphs[0]).sites) == 4  # afterwards too, when Dynamo has forgotten their names


def test_two_modules_that_a_backend_sees_keep_their_parameters_apart():
    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    sites = in_backend(lambda x: other(one(x)), lambda graph, _: inspect_model(graph).sites)
    assert len({site.key for site in sites}) == 2
    assert all(site.weight.endswith(".weight") for site in sites)


def test_sites_of_an_exported_program_whose_parameters_are_inputs():
    model = Block()
    program = torch.export.export(model, (X,))
    lifted = copy.deepcopy(program.graph_module)
    signature = program.graph_signature
    name_placeholders(lifted.graph, signature.inputs_to_parameters, signature.inputs_to_buffers)
    assert set(placeholder_parameters(lifted.graph)) == {name for name, _ in model.named_parameters()}
    assert [tensor_name(node) for node in lifted.graph.nodes][-1] is None
    found, _ = sites_from_graph(normalised(lifted, lifted.graph), lifted)
    reference = capture(program).graph
    assert reference is not None
    assert told(found) == told(sites_from_graph(reference, model)[0])


def test_surgery_on_such_a_graph_is_refused():
    graph = in_backend(Block(), lambda graph, _: graph)
    with pytest.raises(TargetError, match="they are among its inputs"):
        apply_surgery(graph, "antipasto", progress=False)


@pytest.mark.parametrize("part", ['say "x"', "class", "a\nb", "a\\", "x\\n", "it's", "a b", "a[0]", "ünï", "0", "{x}"])
def test_names_that_cannot_stand_in_the_code_of_a_graph(part):
    graph = fx.Graph()
    graph.output(graph.get_attr(f"layers.{part}.weight"))
    model = nn.Module()
    model.layers = nn.ModuleDict({part: nn.Linear(2, 2)})
    try:
        with warnings.catch_warnings(action="ignore"):
            found = fx.GraphModule(model, graph)()
    except (SyntaxError, AttributeError):
        found = None
    assert (found is None) == unwritable(f"layers.{part}.weight")
    assert found is None or found is model.layers[part].weight
