"""Whoever runs a model's forward puts back all that it wrote, as if nobody had looked."""

from __future__ import annotations

import contextlib
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from passes.errors import SurgeryError
from passes.ir.forward_context import state_kept
from passes.ir.tensor_writes import Watch
from tests.support.described import described
from tests.support.traces import SIZE, TRACES, Traces

X = torch.linspace(-1, 1, 4 * SIZE).reshape(4, SIZE)


def made(names: list[str], **options: Any) -> Traces:
    torch.manual_seed(0)
    return Traces(names, **options)


def called(model: nn.Module, *, training: bool = False, grad: bool = False) -> torch.Tensor:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with torch.set_grad_enabled(grad):
        return model.train(training)(X.clone()).detach().nan_to_num()


def check(names: list[str], *, before: int, training: bool, grad: bool, times: int) -> None:
    """Look at one of two equal models, and let both go on."""
    one, other = made(names), made(names)
    for _ in range(before):
        assert torch.equal(called(one), called(other))
    was = described(one)
    with state_kept(one):
        for _ in range(times):
            called(one, training=training, grad=grad)
    assert described(one) == was
    for _ in range(2):
        assert torch.equal(called(one), called(other))
    assert described(one, identities=False) == described(other, identities=False)


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("name", TRACES)
def test_a_trace_of_each_kind_is_taken_away(name, before):
    one, was = made([name]), described(made([name]), identities=False)
    called(one)
    left = name in ("random_numbers",) or described(one, identities=False) != was
    assert left, "the case leaves no trace"
    check([name], before=before, training=True, grad=True, times=2)


@given(
    st.lists(st.sampled_from(sorted(TRACES)), min_size=2, max_size=8),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
)
def test_traces_of_any_kinds_together(names, before, training, grad, times):
    check(names, before=before, training=training, grad=grad, times=times)


@pytest.mark.parametrize("before", [0, 1])
def test_a_forward_that_fails_leaves_no_trace_either(before):
    model = made([*TRACES], fails=True)
    for _ in range(before):
        with contextlib.suppress(RuntimeError):
            called(model)
    was, numbers = described(model), (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy())
    with pytest.raises(RuntimeError, match="after all traces"), state_kept(model):
        model(X.clone())
    assert described(model) == was
    assert random.getstate() == numbers[0]
    assert torch.equal(torch.get_rng_state(), numbers[1])
    assert np.array_equal(np.random.get_state()[1], numbers[2])


def test_what_waits_for_its_backward_still_has_it():
    model = made(["parameter_in_place", "data_of_a_parameter"])
    loss = model.inner(X).square().sum()
    with state_kept(model):
        called(model)
    loss.backward()
    expected = made([]).inner
    expected(X).square().sum().backward()
    assert torch.equal(model.inner.weight.grad, expected.weight.grad)


def test_a_graph_of_autograd_that_a_forward_left_in_a_buffer_is_gone():
    model = made(["buffer_in_place"])
    with state_kept(model):
        called(model, training=True, grad=True)
    assert model.seen.is_leaf
    assert not model.seen.requires_grad


def test_what_cannot_be_put_back_is_said():
    def write():
        with torch.no_grad():
            model.inner.weight.add_(1)

    model = made([])

    def looked_at():
        with state_kept(model):
            thread = threading.Thread(target=write)
            thread.start()
            thread.join()

    with pytest.raises(SurgeryError, match=r"inner\.weight.*lost"):
        looked_at()


def test_without_a_watch_a_write_to_a_parameter_is_refused():
    model = made(["parameter_in_place"])
    with pytest.raises(SurgeryError, match=r"inner\.(weight|bias)"), state_kept(model, watched=False):
        called(model)


def test_memory_is_copied_only_where_it_is_written():
    model = made(["large_buffer_in_place"])
    held: list[int] = []

    before = Watch._copy

    def counted(self: Watch, tensor: torch.Tensor) -> None:
        before(self, tensor)
        held.append(sum(memory.nbytes() for memory in self.copies.values()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "_copy", counted)
        with state_kept(model):
            called(model)
    assert max(held) == model.large.nbytes
