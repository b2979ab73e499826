"""Cores driven far out: no NaN where the true value can be held, promises kept over many steps, exact merges."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import surgery
from passes.errors import InputError
from surgery import Adapter, apply_surgery, merge, set_coeff, sites
from surgery.lowerings import REGISTRY as LOWERINGS
from surgery.variants import Variant
from tests.support.hard_weights import DTYPES, FAST, WEIGHTS, calibration, each_variant, of_every, some, weight_of
from tests.support.reference import array, arrays, reference_delta, reference_delta_weight, reference_output
from tests.support.tolerance import RELATIVE, assert_close
from tests.support.variant_cases import VARIANTS

F64 = torch.float64
FILLS = (0.0, 50.0, -50.0, 1e4, -1e4, 1e30)
COEFFS = (0.0, 1.0, -1.0, 1e-30, 50.0, -50.0)
LINEAR = [v for v in FAST if v.linear]
halves = of_every("dtype", (torch.float32, torch.bfloat16, torch.float16), (torch.float32, torch.float16), ids=str)


def operated(variant: Variant, W: torch.Tensor, lowering: str = "auto", r: int = 4) -> tuple[nn.Module, Adapter]:
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype))
    model[0].weight = nn.Parameter(W.clone())
    model[0].bias = nn.Parameter(some(W.shape[0], seed=8).to(W.dtype))
    data = calibration(variant, some(30, W.shape[1], seed=3), W.dtype) if variant.needs_calibration else None
    options: Any = {"target_modules": "all-linear", "lowering": lowering, "progress": False}
    apply_surgery(model, dataclasses.replace(variant, r=r), calibration=data, **options)
    return model, sites(model)["0"]


def possible(variant: Variant) -> list[str]:
    return ["lowrank", *["dense"] * variant.linear, *["output"] * variant.depends_only_on_Sh]


def fill(site: Adapter, value: float) -> None:
    """Entries of one size, with signs that alternate where there is more than one tensor to fill."""
    with torch.no_grad():
        for i, p in enumerate(site.core.parameters()):
            signs = some(*p.shape, seed=i).sign() if p.dim() > 1 else torch.ones(p.shape)
            p.copy_(value * signs)


def holdable(site: Adapter, x: torch.Tensor, coeff: float) -> bool:
    """Whether the true output, and what the equation names on the way to it, fit the dtype with some room."""
    _, S, Vh, core = arrays(site)
    h = array(x) @ Vh.T
    with torch.no_grad():
        found = [reference_delta(site.variant, h, S, core, coeff), reference_output(site, x, coeff).numpy(), S * h]
        found += [coeff * array(p) * (S.max() if p.dim() == 2 else 1) * abs(h).max() for p in site.core.parameters()]
        found += [reference_delta(site.variant, 1.0 * (h * 0 + abs(h).max()), S, core, coeff) * len(S)]
    return max(abs(t).max() for t in found) < torch.finfo(x.dtype).max / 64


@halves
@each_variant
def test_huge_cores_and_coeffs(variant, dtype):
    W, x = some(6, 8).to(dtype), some(5, 8, seed=2).to(dtype)
    x[0] = 0
    held = 0
    for lowering in possible(variant):
        model, site = operated(variant, W, lowering)
        base = nn.functional.linear(x, site.weight, site.bias)
        for value in FILLS:
            fill(site, value)
            for coeff in COEFFS:
                set_coeff(model, coeff)
                model.zero_grad()
                with torch.no_grad():
                    kept = model(x)
                y = model(x)
                if y.requires_grad:
                    y.double().sum().backward()
                grads = [p.grad for p in site.core.parameters()]
                if coeff == 0:
                    assert torch.equal(y, base), (lowering, value)
                    assert torch.equal(kept, base), (lowering, value)
                    assert all(not g.isnan().any() for g in grads), (lowering, value)
                    if variant.linear:
                        assert not site.delta_weight().any()
                    continue
                if not holdable(site, x, coeff):
                    continue
                held += 1
                for found in (y, kept):
                    assert torch.isfinite(found).all(), (lowering, value, coeff)
                    assert_close(found, reference_output(site, x, coeff), dtype)
                largest = max((float(p.detach().abs().max()) * p.numel() for p in site.core.parameters()), default=0)
                if largest < torch.finfo(dtype).max:  # what the way back multiplies with
                    assert all(torch.isfinite(g).all() for g in grads), (lowering, value, coeff)
                if variant.linear:
                    change = site.delta_weight().detach()
                    assert torch.isfinite(change).all()
                    expected = reference_delta_weight(site, coeff)
                    cancelled = 1e-14 * float(site.factors.S[0])  # what the textbook formula of a rotation leaves
                    assert (change - expected).abs().max() <= RELATIVE[torch.float32] * expected.abs().max() + cancelled
    assert held >= 6


def test_a_row_that_is_not_steered_is_the_base_however_large_the_core():
    for variant in FAST:
        W, x = some(6, 8).half(), some(5, 8, seed=2).half()
        model, site = operated(variant, W)
        base = model_of_site(site, x)
        for value in FILLS:
            fill(site, value)
            set_coeff(model, torch.zeros(5))
            with torch.no_grad():
                assert torch.equal(model(x), base)
            assert torch.equal(model(x), base)


def model_of_site(site: Adapter, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, site.weight, site.bias)


def test_a_merge_that_overflows_is_refused_and_changes_nothing():
    for variant in LINEAR:
        for dtype in (torch.float16, torch.float32):
            model, site = operated(variant, some(6, 8).to(dtype))
            fill(site, 1e38)
            set_coeff(model, 50.0)
            expected = torch.from_numpy(array(site.weight)) + reference_delta_weight(site, 50.0)
            if expected.abs().max() <= torch.finfo(dtype).max:  # ablations and rotations are bounded
                merge(model)
                assert torch.isfinite(model[0].weight).all()
                continue
            before = {name: t.clone() for name, t in model.state_dict().items()}
            with pytest.raises(InputError, match="site '0': the merged weight overflows"):
                merge(model)
            assert sites(model)["0"] is site
            assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


OPTIMISERS: dict[str, Any] = {
    "Adam foreach": lambda ps: torch.optim.Adam(ps, lr=0.3, foreach=True),
    "Adam fused": lambda ps: torch.optim.AdamW(ps, lr=0.3, fused=True, weight_decay=0.1),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=3.0, momentum=0.5),
}
TRAINED = [v for v in VARIANTS if v.linear and set(v.init_core(4, torch.Generator())) - set(v.frozen)]
each_trained = of_every("variant", TRAINED, FAST, ids=lambda v: f"{v.name}-{VARIANTS.index(v)}")


def shaken(model: nn.Module, site: Adapter, step: int, generator: torch.Generator) -> None:
    """Change core or coefficient in one of the ways that users have."""
    p = list(site.core.parameters())[step % len(list(site.core.parameters()))]
    noise = torch.randn(p.shape, generator=generator, dtype=F64)
    kind = step % 7
    if kind == 1:
        p.data.add_(noise)
    elif kind == 2:
        with torch.no_grad():
            p.mul_(0.9).add_(0.1 * noise)
    elif kind == 3:
        model.load_state_dict(model.state_dict() | {"0.sspace.core." + named(site, p): p.detach() + 0.1 * noise})
    elif kind == 4:
        set_coeff(model, float(torch.rand((), generator=generator)) * 2 - 0.5)
    elif kind == 5:
        set_coeff(model, 1.0)
    elif kind == 6:
        p.data[(0,) * p.dim()] += 1.0
    if kind in (1, 6):  # writes to data bump no version
        surgery.refresh(model)


def named(site: Adapter, parameter: torch.Tensor) -> str:
    return next(name for name, p in site.core.named_parameters() if p is parameter)


@pytest.mark.parametrize(
    ("optimiser", "steps"),
    [
        ("Adam foreach", 300),
        ("Adam fused", 40),
        ("SGD", 40),
        pytest.param("Adam foreach", 10_000, marks=pytest.mark.full),
        pytest.param("Adam fused", 1_000, marks=pytest.mark.full),
        pytest.param("SGD", 1_000, marks=pytest.mark.full),
    ],
)
@each_trained
def test_promises_hold_over_many_steps(variant, optimiser, steps):
    model, site = operated(variant, some(12, 16), "dense", r=12)
    generator = torch.Generator().manual_seed(0)
    stepper = OPTIMISERS[optimiser](list(site.core.parameters()))
    x = some(3, 16, seed=5)
    for step in range(steps):
        stepper.zero_grad()
        for p in site.core.parameters():  # a random direction of random size, so that nothing converges
            p.grad = torch.randn(p.shape, generator=generator, dtype=F64) * 10 ** float(
                torch.rand((), generator=generator) * 4 - 2
            )
        stepper.step()
        follows(model, site, x)
        shaken(model, site, step, generator)
        follows(model, site, x)
        if step % 10 == 0:
            keeps_promises(site)
            y = model(x)
            y.square().sum().backward()
            assert all(torch.isfinite(p.grad).all() for p in site.core.parameters())


def follows(model: nn.Module, site: Adapter, x: torch.Tensor) -> None:
    """The materialised weight is that of the present core and coeff."""
    with torch.no_grad():
        owner = site.host.owner
        dense = model(x)
        assert site.cache.peek("dense") is not None
        low_rank = LOWERINGS["lowrank"].run(site, x, lambda: nn.functional.linear(x, owner.weight, owner.bias))
        assert torch.isfinite(low_rank).all()
        size = 1 + x.norm() * (site.weight.norm() + site.delta_weight().norm())
        assert (dense - low_rank).abs().max() <= 1e-13 * size


def keeps_promises(site: Adapter) -> None:
    variant, core, S = site.variant, site.core, site.factors.S
    h, one = some(20, len(S), seed=6), torch.ones_like(S)
    with torch.no_grad():
        coeff = site.steering.coeff.clone()
        bounded = isinstance(variant, surgery.AntiPaSTOAblate) and not variant.allow_amplify
        if bounded:
            M = torch.eye(len(S), dtype=F64) + variant.delta(torch.eye(len(S), dtype=F64), one, core, coeff)
            assert (M - M.T).abs().max() < 1e-12
            values = torch.linalg.eigvalsh(M)
            assert values.min() >= -1e-12
            assert values.max() <= 1 + 1e-12
            changed = S * h + variant.delta(h, S, core, coeff)
            assert (changed.norm(dim=1) <= (S * h).norm(dim=1) * (1 + 1e-12)).all()
        if isinstance(variant, surgery.AntiPaSTORot):
            turned = SimpleNamespace(
                **{n: torch.zeros_like(p) if n == "delta_s" else p for n, p in core.tensors().items()}
            )
            for coefficient in (coeff, torch.ones((), dtype=F64)):
                R = (
                    torch.eye(len(S), dtype=F64)
                    + variant.delta(torch.eye(len(S), dtype=F64), one, turned, coefficient).T
                )
                assert (R @ R.T - torch.eye(len(S), dtype=F64)).abs().max() < 1e-12
            angles = torch.linalg.eigvals(R).angle().abs()
            assert angles.max() <= 1.105  # of a saturated block of four at coeff = 1
        if getattr(variant, "suppress_only", False) and coeff >= 0 and set(core.tensors()) == {"g"}:
            changed = S * h + variant.delta(h, S, core, coeff)
            assert (changed.abs() <= (S * h).abs() * (1 + 1e-15)).all()
        if getattr(variant, "suppress_only", False) and coeff >= 0 and "m" in core.tensors():
            b = len(core.m)
            changed = S * h + variant.delta(h, S, core, coeff)
            assert (changed[:, b:].abs() <= (S * h)[:, b:].abs() * (1 + 1e-15)).all()


MERGED = [name for name in WEIGHTS if name not in ("huge", "top of the range", "one huge entry")]


def spacing(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of neighbours in a dtype at each entry."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(t.double().abs().clamp(min=info.smallest_normal)).exponent - 1
    return info.eps * torch.pow(torch.tensor(2.0, dtype=F64), exponent.double())


def check_merged(found: torch.Tensor, site_weight: torch.Tensor, change: torch.Tensor) -> None:
    """Half a spacing from the float64 sum, and what float64 itself leaves; a half dtype is rounded by way of float32,
    as PyTorch casts it, which moves a tie by half a spacing of that."""
    dtype, exact = found.dtype, site_weight.double() + change
    limit = spacing(exact, dtype) / 2 + 200 * torch.finfo(F64).eps * (
        site_weight.double().abs().max() + change.abs().max()
    )
    if dtype in (torch.float16, torch.bfloat16):
        limit = limit + spacing(exact, torch.float32) / 2
    assert ((found.double() - exact).abs() <= limit).all()


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@of_every("name", MERGED, ("condition 1e7", "rank 3", "one entry", "subnormal"))
@of_every("dtype", DTYPES, (torch.float32, torch.float16), ids=str)
@each_trained
def test_a_merge_is_rounded_once(variant, dtype, name, layout):
    W = weight_of(name, dtype)
    model, site = operated(variant, W) if layout == "out_in" else as_conv1d(variant, W)
    assert site.layout == layout
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in site.core.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    for coeff in (0.7, 0.0):
        copied = copy.deepcopy(model)
        set_coeff(copied, coeff)
        site = sites(copied)["0"]
        weight, change = site.weight.detach().clone(), reference_delta_weight(site, float(site.steering.coeff))
        merge(copied)
        check_merged(copied[0].weight.detach(), weight, change)
        if coeff == 0:
            assert torch.equal(copied[0].weight, weight)


def as_conv1d(variant: Variant, W: torch.Tensor) -> tuple[nn.Module, Adapter]:
    model = nn.Sequential(Conv1D(*W.shape)).to(W.dtype)
    model[0].weight = nn.Parameter(W.T.clone(memory_format=torch.contiguous_format))
    data = calibration(variant, some(30, W.shape[1], seed=3), W.dtype) if variant.needs_calibration else None
    config = dataclasses.replace(variant, r=4)
    apply_surgery(model, config, calibration=data, target_modules="all-linear", progress=False)
    return model, sites(model)["0"]
