"""Convolutions that are called: every variant against unfolded float64 products, rows, tokens, modes, compiled code."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
from surgery import InputError, apply_surgery, inspect_sites, merge, report, set_coeff, sites, steer, undo_surgery
from tests.support.model_state import state_of
from tests.support.reference import arrays, reference_delta
from tests.support.tolerance import assert_close
from tests.support.variant_cases import VARIANTS

X = torch.randn(4, 4, 9, 7, generator=torch.Generator().manual_seed(3))
each_variant = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: f"{v.name}{[x for x in v.hyperparameters().values() if isinstance(x, bool)]}"
)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    one = nn.Conv2d(4, 10, 3, stride=2, padding=1)
    other = nn.Conv2d(10, 8, (2, 3), dilation=(2, 1), padding=1, padding_mode="circular")
    return nn.Sequential(one, nn.GELU(), other).to(dtype).eval()


def calibration(variant: Any, x: torch.Tensor) -> Any:
    if not variant.needs_calibration and variant.statistic != "contrast":
        return None
    return surgery.Contrast([x], [x + 1], pool="mean") if variant.statistic == "contrast" else [x]


def operated(variant: Any, dtype: torch.dtype = torch.float32, scale: float = 0.3) -> nn.Module:
    model, x = network(dtype), X.to(dtype)
    options = {"target_modules": "all-linear", "example_inputs": x, "calibration": calibration(variant, x)}
    apply_surgery(model, variant, r=8, progress=False, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for site in sites(model).values():
            for parameter in site.core.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if hasattr(site.core, "alpha"):  # strengths are clamped to [0, 1]
                site.core.alpha.copy_(torch.linspace(0.3, 0.7, len(site.core.alpha)))
    return model


def unfolded(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    """The windows of an input (batch, channels, height, width) as (batch, height', width', channels * kernel)."""
    mode = {"zeros": "constant", "circular": "wrap"}[layer.padding_mode]
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in layer.padding)], mode=mode)
    span = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, span, axis=(2, 3))
    windows = windows[:, :, :: layer.stride[0], :: layer.stride[1], :: layer.dilation[0], :: layer.dilation[1]]
    return np.moveaxis(windows, 1, 3).reshape(*windows.shape[:1], *windows.shape[2:4], -1)


def expected(model: nn.Module, x: torch.Tensor, coeff: float) -> torch.Tensor:
    """The model in float64 numpy: unfolded products, and the textbook term of each site."""
    found = sites(model)
    h = x.double().numpy()
    for name, layer in model.named_children():
        if name not in found:
            h = F.gelu(torch.from_numpy(h)).numpy()
            continue
        U, S, Vh, core = arrays(found[name])
        windows = unfolded(layer, h)
        W = layer.weight.detach().double().numpy().reshape(len(U), -1)
        y = windows @ W.T + layer.bias.detach().double().numpy()
        y = y + reference_delta(found[name].variant, windows @ Vh.T, S, core, coeff) @ U.T
        h = np.moveaxis(y, -1, 1)
    return torch.from_numpy(np.ascontiguousarray(h))


@each_variant
def test_every_variant_is_its_equation_on_unfolded_inputs(variant):
    for dtype in (torch.float32, torch.float64):
        model, x = operated(variant, dtype), X.to(dtype)
        assert {site.host.name for site in sites(model).values()} == {"module"}
        base = network(dtype)(x)
        with torch.no_grad():
            assert torch.equal(with_coeff(model, 0.0)(x), base)
            for coeff in (1.0, -0.7):
                found = with_coeff(model, coeff)(x)
                assert coeff < 0 or not torch.equal(found, base)
                assert_close(found.double(), expected(model, x, coeff), dtype)


def with_coeff(model: nn.Module, coeff: Any) -> nn.Module:
    return set_coeff(model, coeff)


@each_variant
def test_gradients_are_those_of_the_core_alone(variant):
    model = operated(variant, torch.float64)
    x = X.double().requires_grad_()
    cores = [p for p in model.parameters() if p.requires_grad]
    if not cores:
        return
    y = model(x)
    direction = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((y * direction).sum(), [*cores, x])
    for parameter, grad in zip([*cores, x], grads, strict=True):
        step = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter += sign * 1e-5 * step
                values.append((model(x) * direction).sum())
                parameter -= sign * 1e-5 * step
        slope = (values[0] - values[1]) / 2e-5
        assert abs(slope - (grad * step).sum()) < 1e-5 * (1 + abs(slope))
    assert all(not p.requires_grad for n, p in model.named_parameters() if ".core." not in n)


@each_variant
def test_merged_where_there_is_one_weight(variant):
    model = operated(variant)
    y = model(X).detach()
    if not variant.linear:
        with pytest.raises(surgery.VariantError, match=r"site '0'.*not linear"):
            merge(model)
        return
    shapes = {name: p.shape for name, p in network().named_parameters()}
    merged = merge(copy.deepcopy(model))
    assert {name: p.shape for name, p in merged.named_parameters()} == shapes
    assert_close(merged(X).detach(), y)


def test_rows_have_coefficients_of_their_own():
    model = operated(surgery.AntiPaSTO())
    coeffs = torch.tensor([0.0, 1.0, -1.0, 0.5])
    with torch.no_grad():
        each = [with_coeff(model, float(c))(X[i : i + 1]) for i, c in enumerate(coeffs)]
        with steer(model, coeffs):
            assert_close(model(X), torch.cat(each))
            assert torch.equal(model(X)[:1], network()(X)[:1])
        with steer(model, torch.tensor([1.0, 2.0, 3.0])), pytest.raises(InputError, match="3 rows"):
            model(X)
    alone = nn.Sequential(nn.Conv2d(9, 6, 3)).eval()  # whose channels are no rows
    apply_surgery(alone, "antipasto", r=4, progress=False)
    x = torch.randn(9, 7, 7)
    with torch.no_grad():
        sites(alone)["0"].core.g.fill_(0.4)
        assert_close(alone(x[None])[0], alone(x))
        with steer(alone, torch.linspace(0, 1, 7)), pytest.raises(InputError):
            alone(x)


def test_the_layout_of_the_output_is_that_of_the_base():
    for memory_format in (torch.contiguous_format, torch.channels_last):
        base = network().to(memory_format=memory_format)
        x = X.to(memory_format=memory_format)
        model = operated(surgery.AntiPaSTO()).to(memory_format=memory_format)
        with torch.no_grad():
            assert model(x).stride() == base(x).stride()
            assert torch.equal(with_coeff(model, 0.0)(x), base(x))


def test_modes_of_computing():
    model, base = operated(surgery.AntiPaSTO()), network()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(X)
        assert found.dtype == torch.bfloat16
        assert torch.equal(with_coeff(model, 0.0)(X), base(X))
    with_coeff(model, 1.0)
    with torch.inference_mode():
        assert_close(model(X), expected(model, X, 1.0).float())
    half = model.to(torch.bfloat16)
    assert_close(half(X.bfloat16()).detach(), expected(half, X, 1.0).bfloat16())


@pytest.mark.parametrize("lowering", ["auto", "measure", "lowrank", "output", "dense"])
def test_it_has_one_form_whatever_is_asked_for_elsewhere(lowering):
    model = network()
    apply_surgery(model, "antipasto", r=4, example_inputs=X, lowering=lowering, progress=False)
    assert {row.lowering for row in report(model).sites} == {"lowrank"}


def test_residual_form_keeps_delta_form_here():
    model = network()
    before, base = state_of(model), model(X)
    apply_surgery(model, "antipasto", r=4, example_inputs=X, form="residual", progress=False)
    assert {site.form for site in sites(model).values()} == {"delta"}
    assert torch.equal(model(X), base)
    undo_surgery(model)
    assert state_of(model) == before


class Halved(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


@pytest.mark.parametrize("kind", [Halved, Standardised])
def test_a_convolution_with_code_of_its_own_is_read(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(4, 6, 3)).eval()
    base = model(X)
    found = inspect_sites(model, X)
    (named,) = [*found.sites, *found.skipped]
    if not found.sites:
        assert "computed from the parameter '0.weight'" in named.reason
        return
    apply_surgery(model, "antipasto", r=4, example_inputs=X, progress=False)
    (site,) = sites(model).values()
    assert site.host.name == "weight"
    assert torch.equal(model(X), base)
    with torch.no_grad():
        site.core.g.fill_(0.5)
        want = copy.deepcopy(undo_surgery(copy.deepcopy(model)))
        want[0].weight += site.delta_weight()
        assert_close(model(X), want(X))


def test_two_convolutions_of_one_input_have_statistics_of_their_own():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tall, self.wide, self.far = (
                nn.Conv2d(4, 6, (3, 1)),
                nn.Conv2d(4, 6, (1, 3)),
                nn.Conv2d(4, 6, (3, 1), 2),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tall(x).sum() + self.wide(x).sum() + self.far(x).sum()

    torch.manual_seed(0)
    groups = [site.group for site in inspect_sites(Two().eval(), X).sites]
    assert len(set(groups)) == 3


def test_compiled():
    model = operated(surgery.AntiPaSTO())
    groups = nn.Sequential(*model, nn.Conv2d(8, 8, 3, groups=4)).eval()
    undo_surgery(model)
    apply_surgery(groups, "antipasto", r=4, example_inputs=X, progress=False)
    with torch.no_grad():
        for site in sites(groups).values():
            site.core.g.fill_(0.4)
        compiled = torch.compile(groups, fullgraph=True, backend="aot_eager")
        for coeff in (1.0, -0.5):
            set_coeff(groups, coeff)
            assert_close(compiled(X), groups(X))
