"""``verify=`` means one thing in every verb: example inputs, or True for those that the graph was captured with."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import exporters
import surgery
from surgery import InputError, fold, fuse, merge, pipeline, to_graph
from tests.support.operated_models import operated
from tests.support.zoo import built_once, small_model

VERBS: dict[str, Callable[..., Any]] = {"fold": fold, "fuse": fuse, "merge": merge}


def seen_by(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that are compared from now on, the given ones first."""
    from passes.infra.translation_validation import Validation

    seen: list[Any] = []
    made = Validation.__init__

    def note(self: Validation, call: Any, **options: Any) -> None:
        seen.append(call)
        made(self, call, **options)

    monkeypatch.setattr(Validation, "__init__", note)
    return seen


@built_once
def graph_of(name: str = "mlp") -> tuple[fx.GraphModule, Any]:
    found = operated(name)
    return to_graph(found.model, found.inputs), found.inputs


@pytest.mark.parametrize("verb", VERBS)
def test_true_takes_the_inputs_of_the_capture(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    graph, x = graph_of()
    seen = seen_by(monkeypatch)
    for model, verify, expected in ((copy.deepcopy(graph), True, x), (graph, (2 * x,), 2 * x)):
        VERBS[verb](model, verify=verify)
        ((args, kwargs),) = seen
        assert torch.equal(args[0], expected)
        assert not kwargs
        seen.clear()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("verify", [False, None])
def test_nothing_is_compared_unasked(monkeypatch: pytest.MonkeyPatch, verb: str, verify: Any) -> None:
    graph, _ = graph_of()
    seen = seen_by(monkeypatch)
    VERBS[verb](graph, verify=verify)
    assert not seen


def test_inputs_of_a_capture_may_differ_from_those_that_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    found = operated("mlp")
    x = found.inputs
    seen = seen_by(monkeypatch)
    to_graph(found.model, found.inputs, verify=(3 * x,))
    pipeline(found.model, found.inputs, verify=True)
    assert [torch.equal(call[0][0], expected) for call, expected in zip(seen, (3 * x, x), strict=True)] == [True, True]


def test_a_hub_models_inputs_become_keywords() -> None:
    found = operated("gpt2")
    tokens = {"input_ids": (found.inputs["input_ids"] + 1) % 16}
    graph = to_graph(found.model, {"input_ids": found.inputs["input_ids"]}, verify=tokens)
    fold(graph, verify=True)
    merge(graph, verify=True)


@pytest.mark.parametrize("verify", [3, "yes", [torch.ones(1)], 1.0])
def test_what_is_neither_is_refused(verify: Any) -> None:
    graph, inputs = graph_of()
    nodes = len(graph.graph.nodes)
    for verb in VERBS.values():
        with pytest.raises(InputError, match="verify must be True, False, or example inputs"):
            verb(graph, verify=verify)
    assert len(graph.graph.nodes) == nodes
    with pytest.raises(InputError, match="verify must be True, False, or example inputs"):
        to_graph(operated("mlp").model, inputs, verify=verify)


def test_a_graph_that_was_not_captured_here_needs_inputs() -> None:
    found = small_model("mlp")
    graph = surgery.apply_surgery(fx.symbolic_trace(found.model), "antipasto", r=2, progress=False)
    with pytest.raises(InputError, match="was not captured by it: pass example inputs as verify="):
        fold(graph, verify=True)
    fold(graph, verify=found.inputs)


def test_a_model_in_place_has_no_graph_to_compare() -> None:
    found = operated("mlp")
    for verify in (True, found.inputs):
        with pytest.raises(InputError, match="use to_graph first"):
            merge(found.model, verify=verify)
    assert surgery.sites(found.model)


def test_one_default_each() -> None:
    verbs = [to_graph, fold, fuse, pipeline, merge, exporters.compiled, surgery.apply_surgery]
    for name, default in (("verify", False), ("form", "delta"), ("mode", "merged")):
        parameters = [inspect.signature(verb).parameters.get(name) for verb in verbs]
        assert {parameter.default for parameter in parameters if parameter} == {default}


def test_inputs_that_the_model_does_not_take_are_refused_before_the_capture() -> None:
    found = operated("mlp")
    with pytest.raises(InputError, match="the model does not run on verify's inputs"):
        to_graph(found.model, found.inputs, verify=torch.ones(3, 3))
