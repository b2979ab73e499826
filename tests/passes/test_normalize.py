"""Normalisation: whatever the dialect, the graph speaks ATen and computes the same; and the contract of every pass."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

from passes.errors import PassError
from passes.infra.pass_base import Pass
from passes.infra.pass_manager import Sequential
from passes.infra.translation_validation import Validation
from passes.ir.linear_modules import linear_layout
from passes.transforms.normalize import Normalize
from tests.support.tolerance import assert_close

aten = torch.ops.aten


class Tracer(fx.Tracer):
    """Keeps linear modules of any class as calls, as a hand-written graph may."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return isinstance(module, (nn.Linear, Conv1D)) or super().is_leaf_module(module, path)


class Program(nn.Module):
    """A forward given as a function, with one of everything to use in it."""

    def __init__(self, function: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)
        self.no_bias = nn.Linear(4, 4, bias=False)
        self.conv1d = Conv1D(4, 4)
        nn.init.normal_(self.conv1d.weight)
        self.w = nn.Parameter(torch.randn(4, 4) / 2)
        self.b = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def trace(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, Tracer().trace(model))


def run(model: nn.Module, x: torch.Tensor) -> Any:
    with torch.no_grad():
        return model(x.clone())


def foreign(graph_module: fx.GraphModule) -> list[str]:
    """Calls that are not ATen."""
    calls = [node for node in graph_module.graph.nodes if node.op.startswith("call")]
    return [node.name for node in calls if not isinstance(node.target, torch._ops.OpOverload)]


# every node of these is a product, a sum or a transpose
PROGRAMS: dict[str, tuple[Callable[[Any, Any], Any], Any]] = {
    "linear module": (lambda m, x: m.linear(x), aten.linear.default),
    "linear module by keyword": (lambda m, x: m.linear(input=x), aten.linear.default),
    "linear module without bias": (lambda m, x: m.no_bias(x), aten.linear.default),
    "F.linear": (lambda m, x: F.linear(x, m.w), aten.linear.default),
    "F.linear with bias": (lambda m, x: F.linear(x, m.w, m.b), aten.linear.default),
    "F.linear by keywords": (lambda m, x: F.linear(bias=m.b, weight=m.w, input=x), aten.linear.default),
    "F.linear with some keywords": (lambda m, x: F.linear(x, m.w, bias=m.b), aten.linear.default),
    "torch.matmul": (lambda m, x: torch.matmul(x, m.w), aten.matmul.default),
    "torch.matmul by keywords": (lambda m, x: torch.matmul(other=m.w, input=x), aten.matmul.default),
    "@": (lambda m, x: x @ m.w, aten.matmul.default),
    "x.matmul": (lambda m, x: x.matmul(m.w), aten.matmul.default),
    "torch.mm": (lambda m, x: torch.mm(x, m.w), aten.mm.default),
    "x.mm": (lambda m, x: x.mm(m.w), aten.mm.default),
    "x.mm by keyword": (lambda m, x: x.mm(mat2=m.w), aten.mm.default),
    "torch.addmm": (lambda m, x: torch.addmm(m.b, x, m.w), aten.addmm.default),
    "torch.addmm by keywords": (lambda m, x: torch.addmm(input=m.b, mat1=x, mat2=m.w), aten.addmm.default),
    "torch.addmm with alpha": (lambda m, x: torch.addmm(m.b, x, m.w, alpha=3), aten.addmm.default),
    "torch.addmm with beta": (lambda m, x: torch.addmm(m.b, x, m.w, beta=2), aten.addmm.default),
    "torch.addmm with both": (lambda m, x: torch.addmm(m.b, x, m.w, beta=2, alpha=3), aten.addmm.default),
    "x.addmm with beta": (lambda m, x: x.addmm(x, m.w, beta=2), aten.addmm.default),
    "torch.add": (lambda m, x: torch.add(x, m.b), aten.add.Tensor),
    "torch.add with alpha": (lambda m, x: torch.add(x, m.b, alpha=2), aten.add.Tensor),
    "x.add": (lambda m, x: x.add(m.b), aten.add.Tensor),
    "x.add with alpha": (lambda m, x: x.add(m.b, alpha=2), aten.add.Tensor),
    "+": (lambda m, x: x + m.b, aten.add.Tensor),
    "+ number": (lambda m, x: x + 1.5, aten.add.Tensor),
    "number +": (lambda m, x: 1.5 + x, aten.add.Tensor),
    "w.t()": (lambda m, x: x @ m.w.t(), aten.t.default),
    "torch.t": (lambda m, x: x @ torch.t(m.w), aten.t.default),
    "w.transpose": (lambda m, x: x @ m.w.transpose(0, 1), aten.transpose.int),
    "w.transpose by keywords": (lambda m, x: x @ m.w.transpose(dim0=-1, dim1=-2), aten.transpose.int),
    "w.T": (lambda m, x: x @ m.w.T, aten.matmul.default),
    "w.mT": (lambda m, x: x @ m.w.mT, aten.matmul.default),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_dialect_becomes_aten_and_computes_the_same(name):
    function, target = PROGRAMS[name]
    model, x = Program(function), torch.randn(3, 4)
    if name == "x.addmm with beta":
        x = torch.randn(4, 4)
    graph_module = trace(model)
    assert Normalize().run(graph_module).modified
    assert target in {node.target for node in graph_module.graph.nodes}
    assert foreign(graph_module) == []
    assert torch.equal(run(graph_module, x), run(model, x))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_second_run_changes_nothing(name):
    graph_module = trace(Program(PROGRAMS[name][0]))
    Normalize().run(graph_module)
    code = graph_module.code
    assert not Normalize().run(graph_module).modified
    assert graph_module.code == code
    graph_module.graph.lint()


@pytest.mark.parametrize("name", PROGRAMS)
def test_names_order_and_metadata_of_nodes_are_kept(name):
    graph_module = trace(Program(PROGRAMS[name][0]))
    for i, node in enumerate(graph_module.graph.nodes):
        node.meta["mark"] = i
    before = [node.name for node in graph_module.graph.nodes]
    Normalize().run(graph_module)
    after = {node.name: node for node in graph_module.graph.nodes}
    assert [name for name in after if name in before] == before
    assert [after[name].meta["mark"] for name in before] == list(range(len(before)))


def test_a_conv1d_becomes_a_linear_on_its_transposed_weight():
    model, x = Program(lambda m, x: m.conv1d(x)), torch.randn(2, 3, 4)
    graph_module = trace(model)
    assert Normalize().run(graph_module).modified
    called = {node.target: node for node in graph_module.graph.nodes if node.op == "call_function"}
    assert list(called) == [aten.t.default, aten.linear.default]
    assert called[aten.linear.default].meta["called_module"] == "conv1d"
    assert_close(run(graph_module, x), run(model, x))


def test_an_inlined_module_leaves_its_path():
    graph_module = trace(nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU()))
    Normalize().run(graph_module)
    assert [n.meta.get("called_module") for n in graph_module.graph.nodes if n.op == "call_function"] == ["0.0"]


@pytest.mark.parametrize("x", [torch.randn(3, 4).half(), torch.arange(8).view(2, 4), torch.randn(3, 4).double()])
@pytest.mark.parametrize("function", [lambda m, x: x + 1.5, lambda m, x: 1.5 + x, lambda m, x: torch.add(x, 2)])
def test_a_number_promotes_as_before(function, x):
    model = Program(function)
    graph_module = trace(model)
    Normalize().run(graph_module)
    found, reference = run(graph_module, x), run(model, x)
    assert found.dtype == reference.dtype
    assert torch.equal(found, reference)


def in_place_method(m, x):
    h = x * 2
    h.add_(m.b, alpha=3)
    return h


# the same words with another meaning: what is no sum of tensors, or no matrix to transpose, must stay right
TRAPS: dict[str, Callable[[Any, Any], Any]] = {
    "add_ in place": in_place_method,
    "sizes": lambda m, x: x.view(x.size()[:-1] + (2, 2)),  # noqa: RUF005
    "shapes": lambda m, x: x.reshape(x.shape[:-1] + (2, 2)),  # noqa: RUF005
    "lists": lambda m, x: torch.cat([x] + [x]),  # noqa: RUF005
    "tensor plus size": lambda m, x: x * x.size(0) + x.size(1),
    "batched mT": lambda m, x: x.unsqueeze(0).mT,
    "transposed activation": lambda m, x: x.T,
    "attribute that is no transpose": lambda m, x: x.real,
}


@pytest.mark.parametrize("name", TRAPS)
def test_what_only_looks_the_same_still_computes_the_same(name):
    model, x = Program(TRAPS[name]), torch.randn(3, 4)
    graph_module = trace(model)
    Normalize().run(graph_module)
    assert torch.equal(run(graph_module, x), run(model, x))


def test_an_in_place_sum_stays_in_place():
    graph = fx.Graph()
    x = graph.placeholder("x")
    h = graph.call_function(operator.mul, (x, 2))
    graph.call_function(operator.iadd, (h, x))
    graph.output(h)
    graph_module = fx.GraphModule(nn.Module(), graph)
    assert torch.equal(run(graph_module, torch.ones(3)), torch.full((3,), 3.0))
    Normalize().run(graph_module)
    assert torch.equal(run(graph_module, torch.ones(3)), torch.full((3,), 3.0))


def test_a_sum_of_sizes_stays_an_integer():
    graph_module = trace(Program(lambda m, x: x.size(0) + 1))
    Normalize().run(graph_module)
    found = run(graph_module, torch.randn(3, 4))
    assert type(found) is int
    assert found == 4


@pytest.mark.parametrize("function", [lambda m, x: torch.relu(x), lambda m, x: x * 2, lambda m, x: x.view(-1)])
def test_modified_is_false_where_nothing_is_rewritten(function):
    graph_module = trace(Program(function))
    code = graph_module.code
    assert not Normalize().run(graph_module).modified
    assert graph_module.code == code


def test_an_exported_graph_is_normal_already():
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    graph_module = torch.export.export(model, (torch.randn(3, 4),)).module()
    assert not Normalize().run(graph_module).modified


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def overridden() -> nn.Linear:
    module = nn.Linear(4, 4)
    module.forward = lambda x: 2 * nn.Linear.forward(module, x)
    return module


@pytest.mark.parametrize("build", [lambda: Doubled(4, 4), overridden], ids=["subclass", "instance"])
def test_a_linear_module_with_another_forward_is_not_inlined(build):
    model = nn.Sequential(build())
    x = torch.randn(3, 4)
    graph_module = trace(model)
    assert not Normalize().run(graph_module).modified
    assert torch.equal(run(graph_module, x), run(model, x))


@pytest.mark.parametrize(
    ("module", "layout"),
    [
        (nn.Linear(2, 3), "out_in"),
        (type("Plain", (nn.Linear,), {})(2, 3), "out_in"),
        (Conv1D(3, 2), "in_out"),
        (Doubled(2, 3), None),
        (nn.Bilinear(2, 2, 3), None),
        (nn.Conv1d(2, 3, 1), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layout_of_a_module(module, layout):
    assert linear_layout(module) == layout


# --- random programs ---


STEPS: list[Callable[[Any, Any, Any], Any]] = [
    lambda m, x, y: m.linear(x),
    lambda m, x, y: m.conv1d(x),
    lambda m, x, y: F.linear(weight=m.w, input=x),
    lambda m, x, y: torch.matmul(x, y),
    lambda m, x, y: x @ m.w.T,
    lambda m, x, y: x.mm(m.w.t()),
    lambda m, x, y: torch.addmm(y, x, m.w),
    lambda m, x, y: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2),
    lambda m, x, y: x.add(y),
    lambda m, x, y: torch.add(x, y, alpha=-0.5),
    lambda m, x, y: x + y,
    lambda m, x, y: 0.5 + x,
    lambda m, x, y: x.add_(y * 0.5),
    lambda m, x, y: x.transpose(0, 1) + y,
    lambda m, x, y: x.view(x.size()[:-1] + (2, 2)).flatten(1),  # noqa: RUF005
    lambda m, x, y: torch.tanh(x),
]
STEP = st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 5), st.integers(0, 5))


@given(steps=st.lists(STEP, min_size=1, max_size=6), seed=st.integers(0, 9))
def test_any_program_computes_the_same(steps, seed):
    def function(m, x):
        values = [x, torch.tanh(x)]
        for step, i, j in steps:
            values.append(STEPS[step](m, values[i % len(values)], values[j % len(values)]))
        return torch.stack(values)

    torch.manual_seed(seed)
    model, x = Program(function).double(), torch.randn(4, 4, dtype=torch.float64)
    graph_module = trace(model)
    Normalize().run(graph_module)
    assert_close(run(graph_module, x), run(model, x))
    assert not Normalize().run(graph_module).modified
    graph_module.graph.lint()


# --- the contract of a pass ---


class Scripted(Pass):
    """A pass that does as it is told, and notes what was run."""

    def __init__(self, requires=None, ensures=None, call=lambda graph_module: False) -> None:
        self.requires_says, self.ensures_says, self.body = requires, ensures, call
        self.ran: list[str] = []

    def requires(self, graph_module):
        self.ran.append("requires")
        return self.requires_says

    def call(self, graph_module):
        self.ran.append("call")
        return self.body(graph_module)

    def ensures(self, graph_module):
        self.ran.append("ensures")
        return self.ensures_says


def small_graph() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Tanh()))


def replace_relu(graph_module: fx.GraphModule) -> bool:
    node = next(n for n in graph_module.graph.nodes if n.op == "call_module")
    node.op, node.target = "call_function", torch.sigmoid
    return True


def misorder(graph_module: fx.GraphModule) -> bool:
    first, second = (n for n in graph_module.graph.nodes if n.op == "call_module")
    second.append(first)
    return True


def test_a_failing_precondition_stops_the_pass_before_it_runs():
    scripted = Scripted(requires="no weights")
    with pytest.raises(PassError, match=r"'scripted'.*no weights"):
        scripted.run(small_graph())
    assert scripted.ran == ["requires"]


def test_a_failing_result_is_an_error_that_names_the_pass():
    scripted = Scripted(ensures="a call is left")
    with pytest.raises(PassError, match=r"'scripted'.*a call is left"):
        scripted.run(small_graph())
    assert scripted.ran == ["requires", "call", "ensures"]


def test_a_graph_that_does_not_lint_is_an_error_that_names_the_pass():
    with pytest.raises(PassError, match="'scripted'"):
        Scripted(call=misorder).run(small_graph())


def test_a_changed_graph_is_recompiled_and_is_the_same_object():
    graph_module, x = small_graph(), torch.randn(3)
    result = Scripted(call=replace_relu).run(graph_module)
    assert result.modified
    assert result.graph_module is graph_module
    assert torch.equal(graph_module(x), torch.tanh(torch.sigmoid(x)))


def test_an_unchanged_graph_is_reported_as_such():
    assert not Scripted().run(small_graph()).modified


class Nothing(Pass):
    """The least that a pass may say."""

    def call(self, graph_module):
        return False


def test_a_pass_needs_no_more_than_its_call():
    graph_module, x = small_graph(), torch.randn(3)
    result = Nothing().run(graph_module, validation=Validation(((x,), {})), debug=True)
    assert (result.name, result.modified, result.error) == ("nothing", False, 0.0)
    assert Nothing().comparison_points(graph_module) is None  # so that nothing is run to compare it
    with pytest.raises(TypeError, match="abstract"):
        Pass()


def test_a_sequence_of_passes_is_a_pass():
    inner = Sequential(Scripted(call=replace_relu), Nothing(), name="inner")
    last = Scripted()
    graph_module, x = small_graph(), torch.randn(3)
    result = Sequential(inner, last, Nothing(), stop_after=last.name).run(graph_module)
    assert result.modified
    assert [stage.name for stage in result.stages] == ["inner", "scripted"]
    assert [stage.name for stage in result.stages[0].stages] == ["scripted", "nothing"]
    assert [stage.modified for stage in result.stages] == [True, False]
    assert torch.equal(graph_module(x), torch.tanh(torch.sigmoid(x)))  # its code was generated
    assert not Sequential().run(graph_module).modified
    assert Sequential(Scripted(call=replace_relu)).call(small_graph())


def test_a_failing_stage_of_a_sequence_is_named_and_the_others_do_not_run():
    last = Scripted()
    with pytest.raises(PassError, match=r"'scripted'.*no weights"):
        Sequential(Sequential(Scripted(requires="no weights")), last).run(small_graph())
    assert last.ran == []
    with pytest.raises(PassError, match="no stage is named 'other'; stages are scripted"):
        Sequential(last, disable=["other"])
