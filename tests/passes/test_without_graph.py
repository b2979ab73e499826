"""A model that no capture takes: every matrix that its products read is a site, or is named with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.capture.inspect_model import Inspection, inspect_model
from passes.capture.run_trace import trace_run
from tests.support.model_state import state_of
from tests.support.zoo import Forward

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def branch(x: torch.Tensor) -> bool:
    """A decision by data, at which every capture gives up."""
    return bool(x.sum() < 1e9)


def uncaptured(function: Callable[..., Any], **members: Any) -> Forward:
    """A model that computes a function where the data says so."""
    return Forward(lambda m, x: function(m, x) if branch(x) else x, **members).eval()


def matrices(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))


def one_by_one(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x.new_zeros(len(x), 5)
    chosen = x.argmax(-1)
    for e in chosen.unique().tolist():
        y[chosen == e] = F.linear(x[chosen == e], m.w[e])
    return y


FOUND: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int | None, int, int, str]]] = {
    "experts one by one": (one_by_one, (4, 5, 4), (4, 5, 4, "out_in")),
    "experts, transposed": (lambda m, x: sum(x @ w for w in m.w.unbind()), (3, 4, 5), (3, 5, 4, "in_out")),
    "experts that are gathered": (
        lambda m, x: torch.bmm(m.w[x.argmax(-1)], x[:, :, None])[..., 0], (4, 5, 4), (4, 5, 4, "out_in"),
    ),
    "einsum over experts": (lambda m, x: torch.einsum("bi,eoi->beo", x, m.w), (3, 5, 4), (None, 15, 4, "out_in")),
    "one raw matrix": (lambda m, x: x @ m.w, (4, 5), (None, 5, 4, "in_out")),
    "cast": (lambda m, x: F.linear(x.double(), m.w.double()).float(), (5, 4), (None, 5, 4, "out_in")),
    "cut in two": (lambda m, x: F.linear(x, m.w[:2]) + F.linear(x, m.w[2:]), (4, 4), (None, 4, 4, "out_in")),
    "a convolution": (lambda m, x: F.conv1d(x[:, None], m.w), (5, 1, 3), (None, 5, 3, "out_in")),
    "groups": (lambda m, x: F.conv1d(x[None], m.w, groups=3), (6, 2, 3), (3, 2, 6, "out_in")),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_a_raw_parameter_of_a_product_is_a_site(name):
    function, shape, expected = FOUND[name]
    found = inspect_model(uncaptured(function, w=matrices(*shape)), X)
    assert not found.captured
    (site,) = found.sites
    assert (site.key, site.weight) == ("w", "w")
    assert (site.stack, site.d_out, site.d_in, site.layout) == expected
    assert found.skipped == ()


LEFT: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "computed": (lambda m, x: F.linear(x, m.w * 2), {"w": matrices(5, 4)}, "computed from the parameter 'w'"),
    "both parameters": (lambda m, x: x * (m.w.t() @ m.w).sum(), {"w": matrices(5, 4)}, "both operands are parameters"),
    "two inputs": (lambda m, x: m.two(x, x), {"two": nn.Bilinear(4, 4, 3)}, "it multiplies two inputs"),
    "recurrent": (lambda m, x: m.gru(x)[0], {"gru": nn.GRU(4, 4)}, "its products are inside one module"),
    "cell": (lambda m, x: m.cell(x), {"cell": nn.RNNCell(4, 4)}, "its products are inside one module"),
    "two views": (
        lambda m, x: F.linear(x, m.w.view(10, 4))[:, :5] + x @ m.w[0].T, {"w": matrices(2, 5, 4)}, "different matrices",
    ),
    "not run": (lambda m, x: x, {"w": matrices(5, 4)}, "not read on the example inputs"),
}  # fmt: skip


def told(found: Inspection) -> set[str]:
    return {site.weight for site in found.sites} | {name for skip in found.skipped for name in skip.weights}


@pytest.mark.parametrize("name", LEFT)
def test_any_other_matrix_is_named_with_the_reason(name):
    function, members, reason = LEFT[name]
    model = uncaptured(function, **members)
    found = inspect_model(model, X)
    assert found.sites == ()
    assert all(reason in skip.reason for skip in found.skipped)
    assert {n for n, p in model.named_parameters() if p.dim() > 1} == told(found)


def test_what_is_no_product_is_not_named():
    model = uncaptured(lambda m, x: x * m.w[:1] + m.table(x.argmax(-1)), w=matrices(5, 4), table=nn.Embedding(4, 4))
    assert inspect_model(model, X).skipped == ()


def test_without_inputs_every_matrix_is_named():
    found = inspect_model(uncaptured(lambda m, x: m.a(x) @ m.w, a=nn.Linear(4, 5), w=matrices(5, 4)))
    assert [site.key for site in found.sites] == ["a"]
    (skip,) = found.skipped
    assert (skip.where, skip.weights) == ("w", ("w",))
    assert "example_inputs were not given" in skip.reason


def test_an_operator_of_others_that_reads_a_matrix_is_named():
    @torch.library.custom_op("sspace_test::multiply", mutates_args=())
    def multiply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w

    multiply.register_fake(lambda x, w: x.new_empty(len(x), w.shape[1]))
    for function in (lambda m, x: multiply(x, m.w), lambda m, x: multiply(x, m.w) if branch(x) else x):
        found = inspect_model(Forward(function, w=matrices(4, 5)).eval(), X)
        assert [(skip.weights, "is not known" in skip.reason) for skip in found.skipped] == [(("w",), True)]


def test_a_weight_that_is_read_in_two_ways_and_operated_on_is_not_said_to_be_left_alone():
    tied = nn.Linear(4, 5)
    model = Forward(lambda m, x: F.linear(torch.tanh(m.enc(x)), m.enc.weight.t()), enc=tied).eval()
    found = inspect_model(model, X)
    assert [site.key for site in found.sites] == ["enc"]
    assert found.skipped == ()


def test_tracing_a_run_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    before = state_of(model)
    numbers = torch.get_rng_state()
    graph = trace_run(model, ((X,), {})).graph
    assert [node.target for node in graph.nodes if node.op == "get_attr"] != []
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(module.training for module in model.modules())
