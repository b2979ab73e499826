"""Products whose weight is changed as a whole: convolutions, views, slices, left operands, einsums."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import surgery
from surgery import inspect_sites, load_adapter, merge, save_adapter, set_coeff, sites, to_graph, undo_surgery
from tests.support.model_state import state_of
from tests.support.tolerance import assert_close


class Forward(nn.Module):
    """A module made of one function and what it reads."""

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conv(cls: Any, kernel: Any = 1, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(cls(4, 6, kernel, **options), nn.Tanh())


# a function, the shape of its parameter, its input, and (stack, d_out, d_in, layout)
VIEWS: dict[str, tuple[Any, tuple[int, ...], torch.Tensor, tuple[Any, ...]]] = {
    "bmm": (lambda m, x: torch.bmm(x, m.w), (2, 4, 5), some(2, 3, 4), (2, 5, 4, "in_out")),
    "bmm, turned": (lambda m, x: torch.bmm(x, m.w.mT), (2, 5, 4), some(2, 3, 4), (2, 5, 4, "out_in")),
    "baddbmm": (lambda m, x: torch.baddbmm(x, x, m.w, alpha=2), (2, 4, 4), some(2, 3, 4), (2, 4, 4, "in_out")),
    "matmul": (lambda m, x: x[:, None] @ m.w, (2, 4, 5), some(7, 3, 4), (2, 5, 4, "in_out")),
    "unrolled": (lambda m, x: x @ m.w[0] + x @ m.w[1], (2, 4, 5), some(3, 4), (2, 5, 4, "in_out")),
    "unbound": (lambda m, x: sum(F.linear(x, w) for w in m.w.unbind()), (2, 5, 4), some(3, 4), (2, 5, 4, "out_in")),
    "picked": (lambda m, x: torch.bmm(x, m.w[(x[:, 0, 0] > 0).long()]), (2, 4, 5), some(3, 2, 4), (2, 5, 4, "in_out")),
    "heads out": (lambda m, x: torch.einsum("bpd,hdk->bphk", x, m.w), (2, 4, 5), some(2, 3, 4), (2, 5, 4, "in_out")),
    "heads in": (lambda m, x: torch.einsum("bhk,hkd->bd", x, m.w), (2, 4, 5), some(3, 2, 4), (None, 5, 8, "in_out")),
    "ellipsis": (lambda m, x: torch.einsum("...d,dh->...h", x, m.w), (4, 5), some(3, 4), (None, 5, 4, "in_out")),
    "implicit": (lambda m, x: torch.einsum("bi,oi", x, m.w), (5, 4), some(3, 4), (None, 5, 4, "out_in")),
    "left": (lambda m, x: m.w @ x.T, (5, 4), some(3, 4), (None, 5, 4, "out_in")),
    "left, turned": (lambda m, x: m.w.T @ x.T, (4, 5), some(3, 4), (None, 5, 4, "in_out")),
    "mv": (lambda m, x: torch.mv(m.w, x[0]), (5, 4), some(3, 4), (None, 5, 4, "out_in")),
    "inner": (lambda m, x: torch.inner(x, m.w), (5, 4), some(3, 4), (None, 5, 4, "out_in")),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, dims=([1], [0])), (4, 5), some(3, 4), (None, 5, 4, "in_out")),
    "alpha": (lambda m, x: torch.addmm(x, x, m.w, alpha=2, beta=3), (4, 4), some(3, 4), (None, 4, 4, "in_out")),
    "expanded": (lambda m, x: torch.bmm(x, m.w.expand(2, 4, 5)), (4, 5), some(2, 3, 4), (None, 5, 4, "in_out")),
    "viewed": (lambda m, x: F.linear(x, m.w.view(10, 4)), (2, 5, 4), some(3, 4), (None, 10, 4, "out_in")),
    "split": (lambda m, x: torch.bmm(x, m.w.view(2, 4, 5)), (8, 5), some(2, 3, 4), (2, 5, 4, "in_out")),
    "chunks": (lambda m, x: sum(F.linear(x, w) for w in m.w.chunk(3)), (6, 4), some(3, 4), (None, 6, 4, "out_in")),
    "cut": (lambda m, x: F.linear(x, m.w[1:3]), (6, 4), some(3, 4), (None, 6, 4, "out_in")),
    "cut inside": (lambda m, x: F.linear(x, m.w[:, 1:3]), (6, 4), some(3, 2), (None, 6, 4, "out_in")),
    "functional convolution": (
        lambda m, x: F.conv1d(x, m.w[:, :, None], stride=2), (6, 4), some(2, 4, 5), (None, 6, 4, "out_in"),
    ),
}  # fmt: skip

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "conv1d": (lambda: conv(nn.Conv1d), some(2, 4, 5)),
    "conv2d": (lambda: conv(nn.Conv2d, stride=2, padding=1), some(2, 4, 5, 6)),
    "conv2d same": (lambda: conv(nn.Conv2d, padding="same", bias=False), some(2, 4, 5, 6)),
    "conv2d reflected": (lambda: conv(nn.Conv2d, padding=1, padding_mode="reflect"), some(2, 4, 5, 6)),
    "conv3d": (lambda: conv(nn.Conv3d, dilation=2), some(2, 4, 3, 4, 5)),
    "kernel of 3": (lambda: conv(nn.Conv1d, 3, stride=2, padding=1), some(2, 4, 9)),
    "kernel of 3x2": (lambda: conv(nn.Conv2d, (3, 2), stride=(2, 1), padding=(1, 0)), some(2, 4, 7, 6)),
    "kernel, same": (lambda: conv(nn.Conv2d, (3, 2), padding="same", bias=False), some(2, 4, 5, 6)),
    "kernel, dilated": (lambda: conv(nn.Conv2d, 3, dilation=(1, 2), padding=2), some(2, 4, 5, 6)),
    "kernel, circular": (lambda: conv(nn.Conv2d, 3, padding=(2, 1), padding_mode="circular"), some(2, 4, 5, 6)),
    "kernel, replicated": (lambda: conv(nn.Conv1d, 3, padding=1, padding_mode="replicate"), some(2, 4, 5)),
    "kernel of 2x2x2": (lambda: conv(nn.Conv3d, 2, stride=2), some(2, 4, 4, 4, 5)),
    "groups": (lambda: conv(nn.Conv2d, 3, groups=2, padding=1), some(2, 4, 5, 6)),
    "groups of 1x1": (lambda: conv(nn.Conv1d, 1, groups=2), some(2, 4, 5)),
    "one batch": (lambda: conv(nn.Conv2d, 3), some(4, 5, 6)),
}
CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = CONVOLUTIONS | {
    name: (lambda function=function, shape=shape: Forward(function, w=nn.Parameter(some(*shape, seed=1))), x)
    for name, (function, shape, x, _) in VIEWS.items()
}
each_case = pytest.mark.parametrize("name", CASES)
each_convolution = pytest.mark.parametrize("name", CONVOLUTIONS)


def host_of(name: str) -> str:
    """A convolution of one group is called; any other weight is changed as a whole."""
    return "module" if name in CONVOLUTIONS and not name.startswith("groups") else "weight"


def reference(model: nn.Module, plain: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The plain model in float64 with the weights that the sites should have, made from factors and gains alone."""
    plain = copy.deepcopy(plain).double()
    for key, site in sites(model).items():
        U, S, Vh = (f.double() for f in (site.factors.U, site.factors.S, site.factors.Vh))
        gains = S * F.elu(site.core.g.detach().double() * site.steering.coeff.double())
        change = (U * gains[..., None, :]) @ Vh
        weight = plain.get_parameter(key if key in dict(plain.named_parameters()) else f"{key}.weight")
        with torch.no_grad():
            weight.add_((change if site.layout == "out_in" else change.mT).reshape(weight.shape))
    with torch.no_grad():
        return plain(x.double()).float()


def operate(model: Any, x: torch.Tensor | None, value: float = 0.4, **options: Any) -> Any:
    surgery.apply_surgery(model, "antipasto", r=3, example_inputs=x, progress=False, **options)
    return gains(model, value)


def gains(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for site in sites(model).values():
            site.core.g.copy_(torch.linspace(-value, value * 2, site.core.g.numel()).reshape(site.core.g.shape))
    return model


@pytest.mark.parametrize("name", VIEWS)
def test_a_weight_is_seen_as_matrices(name):
    build, x = CASES[name]
    found = inspect_sites(build(), x)
    assert [(s.key, (s.stack, s.d_out, s.d_in, s.layout)) for s in found.sites] == [("w", VIEWS[name][3])]
    assert [s.reason for s in found.skipped] == []


@each_convolution
@pytest.mark.parametrize("given", [True, False])
def test_a_convolution_is_a_site(name, given):
    build, x = CONVOLUTIONS[name]
    layer = build()[0]
    (site,) = inspect_sites(build(), x if given else None).sites
    assert (site.key, site.layout, site.bias) == ("0", "out_in", None if layer.bias is None else "0.bias")
    stack = None if layer.groups == 1 else layer.groups
    assert (site.stack, site.d_out, site.d_in) == (stack, 6 // layer.groups, layer.weight[0].numel())


@each_case
def test_in_place(name, tmp_path):
    build, x = CASES[name]
    model, plain = build(), build()
    before, base = state_of(model), plain(x).detach()
    operate(model, x, 0.0)
    with torch.no_grad():
        assert torch.equal(model(x), base)
        gains(model, 0.4)
        (site,) = sites(model).values()
        assert site.host.name == host_of(name)
        assert site.delta_weight().shape == site.weight.shape
        expected = reference(model, plain, x)
        assert not torch.allclose(expected, base)
        assert_close(model(x), expected)
        set_coeff(model, 0.0)
        assert torch.equal(model(x), base)
        set_coeff(model, -0.5)
        assert_close(model(x), reference(model, plain, x))
        set_coeff(model, 1.0)
        loaded = load_adapter(build(), save_adapter(model, tmp_path / "adapter"))
        assert torch.equal(loaded(x), model(x))
        assert_close(merge(copy.deepcopy(model))(x), expected)
    model(x).square().sum().backward()
    assert site.core.g.grad.abs().min() > 0
    undo_surgery(model)
    assert state_of(model) == before
    assert torch.equal(model(x), base)


@each_case
def test_in_a_graph(name, tmp_path):
    build, x = CASES[name]
    model, plain = operate(build(), x), build()
    expected = reference(model, plain, x)
    graph = to_graph(model, x)
    assert [(node.host.name, node.layout) for node in sites(graph).values()] == [
        ("weight", next(iter(sites(model).values())).layout)
    ]
    assert_close(graph(x).detach(), expected)
    graph(x).square().sum().backward()
    assert next(iter(sites(graph).values())).core.g.grad.abs().min() > 0
    loaded = load_adapter(build(), save_adapter(graph, tmp_path / "adapter"))
    assert_close(loaded(x).detach(), expected)
    assert_close(merge(graph)(x).detach(), expected)


@each_case
def test_a_graph_module(name, tmp_path):
    build, x = CASES[name]
    graph = torch.export.export(build(), (x,)).module()
    base = graph(x).detach()
    operate(graph, None)
    expected = reference(graph, build(), x)
    assert_close(graph(x).detach(), expected)
    path = save_adapter(graph, tmp_path / "adapter")
    assert_close(load_adapter(build(), path)(x).detach(), expected)
    undo_surgery(graph)
    assert torch.equal(graph(x), base)
    load_adapter(graph, path)
    assert_close(merge(graph)(x).detach(), expected)


@each_convolution
def test_a_convolution_that_a_symbolic_trace_calls(name):
    build, x = CONVOLUTIONS[name]
    plain = build()
    graph = fx.symbolic_trace(plain)
    base = graph(x).detach()
    operate(graph, None)
    expected = reference(graph, build(), x)
    assert_close(graph(x).detach(), expected)
    assert torch.equal(plain(x), base), "the modules of a trace are those of the model"
    copied = copy.deepcopy(graph)
    assert_close(copied(x).detach(), expected)
    assert_close(copy.deepcopy(merge(copied))(x).detach(), expected)
    with pytest.raises(surgery.CaptureError, match="'0' is hosted by a module that the graph calls"):
        to_graph(graph, x)
    undo_surgery(graph)
    assert torch.equal(graph(x), base)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose2d(4, 6, 1), "transposed"),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), "transposed"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_another_convolution_says_why_it_is_no_site(layer, reason, given):
    found = inspect_sites(nn.Sequential(layer, nn.Conv2d(6, 2, 1)), some(2, 4, 5, 6) if given else None)
    assert [site.key for site in found.sites] == ["1"]
    (skipped,) = found.skipped
    assert skipped.where == "0"
    assert reason in skipped.reason


@pytest.mark.parametrize(
    ("function", "shape", "reason"),
    [
        (lambda m, x: torch.einsum("bi,oij->bo", x, m.w), (5, 4, 2), "a dimension that only the parameter has"),
        (lambda m, x: torch.einsum("bi,oio->bo", x, m.w), (5, 4, 5), "takes a diagonal"),
        (lambda m, x: torch.einsum("bi,aijk->bajk", x, m.w[:, :, None]), (2, 4, 2), ""),
        (lambda m, x: torch.einsum("bi,bi,oi->bo", x, x, m.w), (5, 4), "3 operands"),
        (lambda m, x: torch.einsum("bxy,oxpy->bop", x.view(3, 2, 2), m.w), (5, 2, 3, 2), "interleaved"),
        (lambda m, x: F.linear(x, m.w.flip(0)), (5, 4), "computed from the parameter 'w'"),
    ],
)  # fmt: skip
def test_what_is_no_matrix_says_why(function, shape, reason):
    found = inspect_sites(Forward(function, w=nn.Parameter(some(*shape))), some(3, 4))
    if not reason:
        assert [(site.stack, site.d_out, site.d_in) for site in found.sites] == [(2, 2, 4)]
        return
    assert found.sites == ()
    assert reason in found.skipped[0].reason


def test_a_weight_that_is_called_and_cut():
    layer = nn.Linear(4, 6)
    model = Forward(lambda m, x: m.layer(x)[:, :2] + F.linear(x, m.layer.weight[:2]), layer=layer)
    x = some(3, 4)
    plain = copy.deepcopy(model)
    operate(model, x)
    assert sites(model)["layer"].host.name == "weight"
    assert_close(model(x).detach(), reference(model, plain, x))
    graph = fx.symbolic_trace(plain)
    with pytest.raises(surgery.TargetError, match="read by a module's call, and without one"):
        operate(graph, None)


def test_sees_one_weight_in_two_ways():
    model = Forward(lambda m, x: F.linear(x, m.w.view(10, 4))[:, :5] + x @ m.w[0].T, w=nn.Parameter(some(2, 5, 4)))
    found = inspect_sites(model, some(3, 4))
    assert [s.reason for s in found.skipped] == ["its products see its weight as different matrices"]


@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if not name.startswith("groups")])
def test_calibration_sees_the_unfolded_input(name):
    build, x = CONVOLUTIONS[name]
    model = build()
    surgery.apply_surgery(
        model, surgery.AntiPaSTOCorDA(r=3, cov_eps=0.0), calibration=[CONVOLUTIONS[name][1]], progress=False
    )
    layer = build()[0].double()
    window = copy.deepcopy(layer)  # gives each entry of the window as a channel of its own
    rows = torch.eye(layer.weight[0].numel(), dtype=torch.float64)
    window.weight, window.bias = nn.Parameter(rows.reshape(-1, *layer.weight.shape[1:])), None
    tokens = window(x.double() if x.dim() > layer.weight.dim() - 1 else x[None].double()).detach()
    tokens = tokens.movedim(1, -1).flatten(0, -2)
    W = layer.weight.detach().flatten(1).double()
    moment = W @ (tokens.T @ tokens / len(tokens)) @ W.T
    expected = torch.linalg.eigvalsh(moment).flip(0)[:3].clamp(min=0).sqrt()
    assert_close(sites(model)["0"].factors.S, expected.float())
