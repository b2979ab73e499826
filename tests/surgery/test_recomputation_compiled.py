"""Recomputed forwards of compiled code, and of models of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import surgery
from surgery import apply_surgery, sites, steer, to_graph
from tests.support.checkpointed_models import (
    COEFFICIENTS,
    KINDS,
    apart,
    checkpointed,
    expected,
    gradients,
    inputs,
    loss_of,
)

CLOSE = 1e-12
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def outputs_of(model: Any, call: Any, x: Tensor, coefficients: list[Any]) -> list[Tensor]:
    outputs = []
    for coeff in coefficients:
        with steer(model, coeff):
            outputs.append(call(x))
    return outputs


@pytest.mark.matrix
@each_backend
@pytest.mark.parametrize("coefficient", ["scalar", "rows", "tokens"])
@pytest.mark.parametrize("kind", [None, "non-reentrant"])
def test_a_compiled_root_trains_with_coefficients_that_change(backend: str, coefficient: str, kind: str | None) -> None:
    model, x, counter = checkpointed(kind), inputs(), CompileCounterWithBackend(backend)
    call, coefficients = torch.compile(model, backend=counter, fullgraph=True), COEFFICIENTS[coefficient]
    loss_of(outputs_of(model, call, x, coefficients)).backward()
    assert apart(gradients(model, x), expected(model, [[c] * 3 for c in coefficients])) < CLOSE
    graphs = counter.frame_count
    loss_of(outputs_of(model, call, x, [-0.5 * c for c in coefficients])).backward()
    assert counter.frame_count == graphs


@pytest.mark.matrix
@each_backend
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "selective"])  # it stores operations by themselves
def test_compiled_blocks_are_recomputed_with_their_own_coefficient(backend: str, kind: str) -> None:
    model, x, counter = checkpointed(kind), inputs(), CompileCounterWithBackend(backend)
    for layer in model.layers:
        layer.compile(backend=counter, fullgraph=True)
    coefficients = COEFFICIENTS["scalar"]
    loss_of(outputs_of(model, model, x, coefficients)).backward()
    assert apart(gradients(model, x), expected(model, [[c] * 3 for c in coefficients])) < CLOSE
    graphs = counter.frame_count
    loss_of(outputs_of(model, model, x, [0.2, 0.3, -4.0])).backward()
    assert counter.frame_count == graphs


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
def test_compiled_blocks_refuse_what_they_cannot_recompute(kind: str) -> None:
    model, x = checkpointed(kind), inputs()
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    rows = COEFFICIENTS["rows"][0]
    with steer(model, rows):
        loss = (model(x) ** 3).sum()
    with pytest.raises(surgery.SurgeryError, match=r"ran with coeff of shape \(4,\), and coeff of shape \(\)"):
        loss.backward()
    with steer(model, rows):
        x.grad = None
        model.zero_grad()
        (model(x) ** 3).sum().backward()
    assert apart(gradients(model, x), expected(model, [[rows] * 3])) < CLOSE
    loss = (model(x) ** 3).sum()
    with torch.no_grad():
        sites(model)["layers.1.up"].core.g.mul_(2.0)
    with pytest.raises(surgery.SurgeryError, match="written to between"):
        loss.backward()


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES, vocab_size=64, num_key_value_heads=2, head_dim=8, initializer_range=0.2)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, vocab_size=64, num_key_value_heads=2, initializer_range=0.2)
    ),
}


@pytest.mark.matrix
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("coefficient", ["scalar", "rows", "tokens"])
def test_models_of_transformers_with_gradient_checkpointing(name: str, reentrant: bool, coefficient: str) -> None:
    torch.manual_seed(0)
    model = apply_surgery(MODELS[name]().double().train(), "antipasto", r=8, progress=False)
    for site in sites(model).values():
        torch.nn.init.normal_(site.core.g, std=0.3)
    ids = torch.randint(3, 60, (4, 5))
    found = []
    for one in (copy.deepcopy(model), model):
        if one is model:
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            one.enable_input_require_grads()
        losses = []
        for coeff in COEFFICIENTS[coefficient]:
            with steer(one, coeff):
                losses.append(one(input_ids=ids, labels=ids).loss)
        (losses[0] - 2 * losses[1]).backward()
        found.append([site.core.g.grad for site in sites(one).values()])
    assert apart(found[1], found[0]) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_is_recomputed_with_its_own_coefficient(kind: str) -> None:
    model, x = checkpointed(None), inputs()
    coefficients = COEFFICIENTS["scalar"] + COEFFICIENTS["rows"]
    known = expected(model, [[c] * 3 for c in coefficients])
    graph = to_graph(model, inputs().detach())
    loss_of(outputs_of(graph, lambda y: KINDS[kind](graph, y), x, coefficients)).backward()
    assert apart(gradients(graph, x), known) < CLOSE
