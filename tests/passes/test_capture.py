"""Capture: every way in gives one graph that computes the same, and the model is left as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

from passes.capture.capture import capture, default_inputs, forward_call
from passes.errors import InputError
from tests.support.tolerance import assert_close
from tests.support.zoo import PLAIN_NAMES, Forward, SmallModel, small_model

PLAIN_VALUES = (int, float, str, bool, type(None), tuple, list, dict, set)


def with_linear(function: Callable[..., Any], **members: Any) -> Forward:
    """A module that has a linear one beside its other members."""
    return Forward(function, linear=nn.Linear(4, 4), **members)


def state(model: nn.Module) -> dict[str, Any]:
    """All that a capture must leave as it was: flags, hooks, attributes, tensors, configuration, random state."""
    found: dict[str, Any] = {"torch": torch.get_rng_state().tolist(), "python": random.getstate()}
    for path, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        found[path] = (
            type(module),
            {k: copy.copy(v) if isinstance(v, PLAIN_VALUES) else id(v) for k, v in own.items()},
            {
                k: (id(p), p._version, p.requires_grad, p.grad is None)
                for k, p in module.named_parameters(recurse=False)
            },
            {k: (id(b), b.tolist()) for k, b in module.named_buffers(recurse=False)},
            {k: id(child) for k, child in module.named_children()},
        )
    if hasattr(model, "config"):
        found["config"] = model.config.to_dict()
    return found


def mixed(model: nn.Module) -> nn.Module:
    """Put a model in a mode that is neither all train nor all eval, with one parameter frozen."""
    model.train()
    next(model.children(), model).eval()
    next(model.parameters()).requires_grad_(False)
    return model


def first(output: Any) -> torch.Tensor:
    """First tensor of any output."""
    return torch.utils._pytree.tree_leaves(output)[0]


def nodes(graph: fx.Graph) -> list[tuple[str, str, Any]]:
    """What a graph says, to compare before and after."""
    return [(node.name, node.op, node.target) for node in graph.nodes]


def whisper() -> nn.Module:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=16,
            max_target_positions=16, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        )
    )  # fmt: skip


def clip_vision() -> nn.Module:
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    )


def pretrained(name: str) -> nn.Module:
    extra = {"whisper": whisper, "clip_vision": clip_vision}
    return extra[name]().eval() if name in extra else small_model(name).model


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: {"input": x}], ids=["tensor", "tuple", "dict"])
def test_every_form_of_inputs_gives_the_same_graph(form):
    given = small_model("mlp")
    inputs = form(given.inputs)
    found = capture(given.model, inputs)
    assert (found.how, found.note) == ("torch.export", None)
    args, kwargs = forward_call(inputs)
    assert torch.equal(found.graph(*args, **kwargs), given.run())


@pytest.mark.parametrize("bad", [[torch.zeros(1, 4)], 3, "x", {1, 2}], ids=lambda bad: type(bad).__name__)
def test_inputs_of_another_type_are_an_error_that_names_it(bad):
    with pytest.raises(InputError, match=type(bad).__name__):
        forward_call(bad)
    with pytest.raises(InputError, match="dict"):
        capture(nn.Linear(4, 4), bad)


def test_a_tokenizer_output_counts_as_a_mapping():
    ids = torch.tensor([[1, 2]])
    args, kwargs = forward_call(transformers.BatchEncoding({"input_ids": ids}))
    assert args == ()
    assert list(kwargs) == ["input_ids"]
    assert kwargs["input_ids"] is ids


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_a_plain_model_is_exported_and_left_as_it_was(name):
    given = small_model(name)
    mixed(given.model)
    before = state(given.model)
    found = capture(given.model, given.inputs)
    assert (found.how, found.note) == ("torch.export", None)
    assert state(given.model) == before
    own = dict(given.model.named_parameters())
    assert {n: id(p) for n, p in found.graph.named_parameters()} == {n: id(p) for n, p in own.items()}
    given.model.eval()
    args, kwargs = forward_call(given.inputs)
    with torch.no_grad():
        assert_close(first(found.graph(*args, **kwargs)), given.run())


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bert", "vit", "t5", "whisper", "clip_vision"])
def test_a_pretrained_model_brings_its_own_inputs_and_is_left_as_it_was(name):
    model = pretrained(name)
    inputs = default_inputs(model)
    with torch.no_grad():
        reference = first(dict(model(**inputs)))
    mixed(model)
    before = state(model)
    found = capture(model)
    assert (found.how, found.note) == ("transformers.exporters", None)
    after = state(model)
    assert [path for path in before if before[path] != after[path]] == []
    assert_close(first(found.graph(**{k: v for k, v in inputs.items() if k in placeholders(found.graph)})), reference)


def placeholders(graph_module: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"}


def test_a_plain_model_has_no_default_inputs():
    assert default_inputs(nn.Linear(4, 4)) is None


@pytest.mark.parametrize("positional", [lambda d: (d["input_ids"], d["attention_mask"]), lambda d: d["input_ids"]])
def test_positional_inputs_of_a_pretrained_model(positional):
    given = small_model("bert")
    found = capture(given.model, positional(given.inputs))
    assert (found.how, found.note) == ("transformers.exporters", None)
    inputs = {k: v for k, v in given.inputs.items() if k in placeholders(found.graph)}
    assert_close(first(found.graph(**inputs)), given.run())


def test_labels_do_not_bring_a_loss_into_the_graph():
    given = small_model("bert")
    with_labels = capture(given.model, {**given.inputs, "labels": torch.tensor([0, 1])})
    assert nodes(with_labels.graph.graph) == nodes(capture(given.model, given.inputs).graph.graph)


def test_without_inputs_a_plain_model_is_traced_symbolically():
    given = small_model("mlp")
    mixed(given.model)
    before = state(given.model)
    found = capture(given.model)
    assert (found.how, found.note) == ("fx.symbolic_trace", None)
    assert state(given.model) == before
    assert torch.equal(found.graph(given.inputs), given.run())


@pytest.mark.parametrize("inputs", [None, torch.ones(2, 4)], ids=["symbolic", "export"])
def test_the_graph_is_that_of_eval_mode(inputs):
    model = with_linear(lambda m, x: m.linear(x) if m.training else m.other(x), other=nn.Linear(4, 4)).train()
    graph = capture(model, inputs).graph
    read = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr" and n.users}
    assert read == {"other.weight", "other.bias"}
    assert model.training


def count_in_place(model, x):
    model.count.add_(1)
    return model.linear(x)


def count_by_assignment(model, x):
    model.count = model.count + 1
    return model.linear(x)


def remember(model, x):
    model.calls = model.calls + 1
    model.last = x
    return model.linear(x)


def draw(model, x):
    return model.linear(x + torch.randn(4))


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("inputs", [None, torch.ones(2, 4)], ids=["symbolic", "export"])
@pytest.mark.parametrize("function", [count_in_place, count_by_assignment, remember, draw])
def test_what_a_forward_writes_is_put_back(function, inputs):
    model = with_linear(function, count=torch.zeros(1), calls=0, last=None)
    before = state(model)
    assert capture(model, inputs).graph is not None
    after = state(model)
    assert [key for key in before if before[key] != after[key]] == []


@pytest.mark.parametrize("build", [lambda: Conv1D(4, 4), lambda: type("Plain", (nn.Linear,), {})(4, 4)])
def test_a_symbolic_trace_sees_the_call_of_any_linear_module(build):
    graph = capture(nn.Sequential(build(), nn.ReLU())).graph
    assert [n.meta["called_module"] for n in graph.graph.nodes if "called_module" in n.meta] == ["0"]


@pytest.mark.parametrize("way", ["symbolic", "exported"])
def test_a_graph_module_is_read_and_not_rewritten(way):
    given = small_model("mlp")
    if way == "symbolic":
        graph_module = fx.symbolic_trace(given.model)
    else:
        graph_module = torch.export.export(given.model, (given.inputs,)).module()
    before, code = nodes(graph_module.graph), graph_module.code
    found = capture(graph_module)
    assert (found.how, found.note) == ("GraphModule", None)
    assert nodes(graph_module.graph) == before
    assert graph_module.code == code
    assert found.graph is not graph_module
    assert all(found.graph.get_parameter(name) is p for name, p in graph_module.named_parameters())
    output = found.graph(given.inputs)
    assert isinstance(output, torch.Tensor)
    assert torch.equal(output, given.run())


def test_an_exported_program_is_read_and_not_rewritten():
    given = small_model("mlp")
    program = torch.export.export(given.model, (given.inputs,))
    before = nodes(program.graph)
    found = capture(program)
    assert (found.how, found.note) == ("ExportedProgram", None)
    assert nodes(program.graph) == before
    own = {name: p.data_ptr() for name, p in given.model.named_parameters()}
    assert {name: p.data_ptr() for name, p in found.graph.named_parameters()} == own
    assert torch.equal(found.graph(given.inputs), given.run())


@pytest.mark.parametrize("inputs", [None, torch.ones(2, 4)], ids=["symbolic", "export"])
def test_a_model_that_resists_gives_a_note_and_is_left_as_it_was(inputs):
    model = mixed(with_linear(lambda m, x: m.linear(x) if x.sum() > 0 else m.other(x), other=nn.Linear(4, 4)))
    before = state(model)
    found = capture(model, inputs)
    assert found.graph is None
    assert found.how == "module walk"
    assert "Error" in found.note or "GuardOnDataDependent" in found.note
    assert state(model) == before


UNFIT = {
    "dtype": {"input_ids": torch.zeros(2, 3), "no_such_argument": torch.ones(1)},
    "sizes": {n: torch.zeros(2, k, dtype=torch.long) for n, k in (("input_ids", 3), ("token_type_ids", 4))},
}


@pytest.mark.parametrize("inputs", UNFIT.values(), ids=UNFIT)
def test_inputs_that_do_not_fit_leave_a_pretrained_model_as_it_was(inputs):
    model = mixed(small_model("bert").model)
    before = state(model)
    found = capture(model, inputs)
    assert found.graph is None
    assert found.note
    after = state(model)
    assert [path for path in before if before[path] != after[path]] == []


@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_a_forward_set_on_the_instance_is_kept(name):
    given = small_model(name)
    given.model.forward = own = given.model.forward
    assert capture(given.model, given.inputs).note is None
    assert vars(given.model)["forward"] is own


def test_inputs_are_not_changed_by_capture():
    model = with_linear(lambda m, x: m.linear(x.add_(1)))
    x = torch.zeros(2, 4)
    assert capture(model, x).note is None
    assert torch.equal(x, torch.zeros(2, 4))


def test_inputs_may_come_out_of_another_computation():
    embedded = nn.Embedding(8, 12)(torch.tensor([1, 2, 3]))
    given = SmallModel("mlp", small_model("mlp").model, embedded)
    found = capture(given.model, given.inputs)
    assert found.note is None
    assert torch.equal(found.graph(embedded.detach()), given.run())
