"""Calls: which modules a forward really calls and which weights it reads past the module; the model is left alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks

from passes.analysis.linear_sites import sites_from_walk
from passes.capture.capture import forward_call
from passes.capture.module_calls import CallRecord, record_calls
from passes.errors import InputError
from tests.support.zoo import HUB_NAMES, Forward, small_model

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def with_linear(function: Callable[..., Any], **members: Any) -> Forward:
    """A module that has a linear one beside its other members."""
    return Forward(function, linear=nn.Linear(4, 4), **members)


def record(model: nn.Module, inputs: Any = None) -> CallRecord:
    return record_calls(model, forward_call(X if inputs is None else inputs))


def state(model: nn.Module) -> dict[str, Any]:
    """What recording must leave as it was."""
    return {
        "training": {path: module.training for path, module in model.named_modules()},
        "buffers": {name: (id(b), b.tolist()) for name, b in model.named_buffers()},
        "parameters": {n: (id(p), p._version, p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "attributes": {path: set(vars(module)) for path, module in model.named_modules()},
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "hooks": global_hooks(),
    }


def global_hooks() -> list[int]:
    return [
        len(hooks._global_forward_hooks),
        len(hooks._global_forward_pre_hooks),
        len(hooks._global_forward_hooks_always_called),
        len(hooks._global_forward_hooks_with_kwargs),
    ]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in before if before[key] != after[key]]


# --- read without the call ---


@pytest.mark.parametrize("training", [False, True])
def test_attention_reads_its_output_projection_without_calling_it(training):
    given = small_model("attention")
    found = record(given.model.train(training), given.inputs)
    assert found.called == {""}
    assert found.read == {"out_proj.weight", "out_proj.bias"}
    assert found.note is None


@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_layer_reads_in_eval_what_it_calls_in_train(training):
    given = small_model("encoder_layer")
    found = record(given.model.train(training), given.inputs)
    assert {"linear1", "linear2", "self_attn"} <= found.called
    assert "self_attn.out_proj" not in found.called
    assert {"linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"} <= found.read
    assert {"self_attn.out_proj.weight", "self_attn.in_proj_weight"} <= found.read


def test_a_whole_encoder_reads_in_every_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = record(nn.TransformerEncoder(layer, 2), torch.randn(2, 3, 8))
    for i in (0, 1):
        assert {f"layers.{i}.linear1.weight", f"layers.{i}.self_attn.out_proj.weight"} <= found.read


READS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "called": (lambda m, x: m.linear(x), set()),
    "read": (lambda m, x: F.linear(x, m.linear.weight), {"linear.weight"}),
    "read transposed": (lambda m, x: x @ m.linear.weight.t(), {"linear.weight"}),
    "called and read": (lambda m, x: F.linear(m.linear(x), m.linear.weight), {"linear.weight"}),
    "shape only": (lambda m, x: m.linear(x) * m.linear.weight.shape[0], set()),
    "own parameter": (lambda m, x: x @ m.w, set()),
    "in eval only": (lambda m, x: m.linear(x) if m.training else F.linear(x, m.linear.weight), {"linear.weight"}),
    "in train only": (lambda m, x: F.linear(x, m.linear.weight) if m.training else m.linear(x), {"linear.weight"}),
}


@pytest.mark.parametrize("name", READS)
def test_what_counts_as_read(name):
    function, read = READS[name]
    found = record(with_linear(function, w=nn.Parameter(torch.randn(4, 4))))
    assert found.read == read
    assert ("linear" in found.called) == (name not in ("read", "read transposed", "own parameter"))


@pytest.mark.parametrize("name", ["mlp", *HUB_NAMES])
def test_ordinary_models_call_all_their_sites_and_read_none(name):
    given = small_model(name)
    found = record(given.model, given.inputs)
    assert found.note is None
    assert {site.key for site in sites_from_walk(given.model)[0]} <= found.called
    assert found.read == set()


def test_a_tied_weight_is_read_only_where_no_owner_is_called():
    embed = nn.Embedding(5, 4)
    head = nn.Linear(4, 5, bias=False)
    head.weight = embed.weight
    ids = torch.tensor([1, 2])
    assert record(with_linear(lambda m, x: m.head(m.embed(x)), embed=embed, head=head), ids).read == set()
    found = record(with_linear(lambda m, x: F.linear(m.embed(x), m.embed.weight), embed=embed), ids)
    assert found.read == {"embed.weight"}


def test_a_module_under_two_names_is_called_under_the_first():
    module = nn.Linear(4, 4)
    found = record(with_linear(lambda m, x: m.second(m.first(x)), first=module, second=module))
    assert "first" in found.called
    assert "second" not in found.called


def test_modules_of_other_models_are_not_recorded():
    stranger = [nn.Sequential(nn.Linear(4, 4))]
    found = record(with_linear(lambda m, x: m.linear(stranger[0](x))))
    assert found.called == {"", "linear"}
    assert found.read == set()


class Refuses(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not today")


def fall_back(m, x):
    try:
        return m.refuses(x)
    except ValueError:
        return F.linear(x, m.refuses.weight)


def test_a_call_that_fails_and_is_caught_does_not_hide_a_read():
    assert record(with_linear(fall_back, refuses=Refuses(4, 4))).read == {"refuses.weight"}


# --- the model is left as it was ---


def buffer_by_assignment(m, x):
    m.seen = m.seen + 1
    return m.linear(x)


def buffer_in_place(m, x):
    m.seen.add_(1)
    return m.linear(x)


def new_attribute(m, x):
    m.last = x
    return m.linear(x)


def new_buffer(m, x):
    m.register_buffer("cache", x)
    return m.linear(x)


WRITES: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)),
    "noise": lambda: with_linear(lambda m, x: m.linear(x) + torch.randn(4)),
    "python's random numbers": lambda: with_linear(lambda m, x: m.linear(x) * random.random()),
    "buffer in place": lambda: with_linear(buffer_in_place, seen=torch.zeros(1)),
    "buffer by assignment": lambda: with_linear(buffer_by_assignment, seen=torch.zeros(1)),
    "new attribute": lambda: with_linear(new_attribute),
    "new buffer": lambda: with_linear(new_buffer),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_a_forward_writes_is_put_back(name):
    model = WRITES[name]().train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    found = record(model)
    assert differences(before, state(model)) == []
    assert found.note is None
    assert len(found.called) >= 2


@pytest.mark.parametrize("name", ["encoder_layer", "gpt2", "vit"])
def test_a_model_is_left_as_it_was(name):
    given = small_model(name)
    reference = given.run()
    given.model.train()
    next(given.model.children()).eval()
    before = state(given.model)
    record(given.model, given.inputs)
    assert differences(before, state(given.model)) == []
    given.model.eval()
    assert torch.equal(given.run(), reference)


def test_a_model_that_runs_in_eval_only_gives_a_note():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    before = state(model)
    found = record(model, X[:1])
    assert "train mode" in found.note
    assert "ValueError" in found.note
    assert found.called == {"", "0", "1"}
    assert differences(before, state(model)) == []


UNFIT = [torch.randn(3, 5), (torch.randn(3, 4), torch.randn(3, 4)), {"no_such_argument": torch.randn(3, 4)}]


@pytest.mark.parametrize("inputs", UNFIT, ids=["shape", "count", "name"])
def test_inputs_that_do_not_fit_are_an_error_and_the_model_is_left_as_it_was(inputs):
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4)).train()
    model[0].eval()
    before = state(model)
    with pytest.raises(InputError, match="Sequential does not run on the example inputs"):
        record(model, inputs)
    assert differences(before, state(model)) == []


def test_hooks_of_others_stay():
    handle = hooks.register_module_forward_hook(lambda module, args, output: None)
    try:
        before = global_hooks()
        record(nn.Sequential(nn.Linear(4, 4)))
        with pytest.raises(InputError):
            record(nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 5))
        assert global_hooks() == before
    finally:
        handle.remove()


# --- inputs ---


def test_inputs_are_not_written_to_and_are_the_same_in_both_runs():
    sums = []

    def function(m, x):
        sums.append(float(x.sum()))
        return m.linear(x.add_(1))

    x = torch.zeros(3, 4)
    record(with_linear(function), x)
    assert sums == [0.0, 0.0]
    assert torch.equal(x, torch.zeros(3, 4))


def test_inputs_may_come_out_of_another_computation():
    embedded = nn.Embedding(8, 4)(torch.tensor([1, 2, 3]))
    assert record(nn.Sequential(nn.Linear(4, 4)), embedded).called == {"", "0"}


class Same(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x if x is y else y.new_zeros(0, self.not_the_same_tensor)


def test_one_tensor_given_twice_stays_one_tensor():
    assert record(Same(), (X, X)).called == {""}


def branch(m, x):
    return torch.cond(x.sum() > 0, m.linear, lambda x: -m.linear(x), (x,))


def compiled_region(m, x):
    return torch.compile(torch.tanh, backend="eager", fullgraph=True)(m.linear(x))


@pytest.mark.parametrize("function", [branch, compiled_region])
def test_operators_of_higher_order_and_compiled_regions_are_seen_through(function):
    found = record(with_linear(function))
    assert found.note is None
    assert found.called == {"", "linear"}
    assert found.read == set()
