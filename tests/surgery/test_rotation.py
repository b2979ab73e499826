"""The rotation variant: planes that turn by closed forms, against the exponential and a second reference."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery import apply_surgery, set_coeff, sites
from surgery.cores._cayley import inverse
from surgery.modules.core import Core
from surgery.variants import Variant
from tests.support.core_deltas import F64, core_of, delta, expected_delta, some
from tests.support.reference import array
from tests.support.tolerance import RELATIVE, assert_close


def rotation(config: Variant, r: int, core: Any, coeff: float, dtype: torch.dtype = F64) -> torch.Tensor:
    """``R_v``, which is what delta turns h by where S is 1 and does not shift."""
    eye = torch.eye(r, dtype=dtype)
    return eye + delta(config, eye, torch.ones(r, dtype=dtype), core, coeff).T


def turning(size: int, scale: float, seed: int = 0, dtype: torch.dtype = F64, **options: Any) -> tuple[Variant, Core]:
    """A rotation of two blocks of V, and nothing else."""
    config = surgery.AntiPaSTORot(block_size=size, **options)
    core = core_of(config, 2 * size, scale, seed, dtype)
    with torch.no_grad():
        core.delta_s.zero_()
    return config, core


@given(st.sampled_from([2, 3, 4, 5, 8, 11]), st.floats(-10, 10), st.sampled_from([1e-3, 0.3, 50.0]), st.integers(0, 99))
@example(4, 10.0, 50.0, 0)
@example(8, -10.0, 50.0, 0)
def test_the_opposite_coeff_turns_back(size, coeff, scale, seed):
    for dtype in (torch.float64, torch.float32):
        config, core = turning(size, scale, seed, dtype)
        eye, rounding = torch.eye(2 * size, dtype=dtype), max(40, 10 * size) * torch.finfo(dtype).eps
        R, back = (rotation(config, 2 * size, core, c, dtype) for c in (coeff, -coeff))
        assert (R @ back - eye).abs().max() < rounding
        assert (R @ R.T - eye).abs().max() < rounding
        assert (R - back.T).abs().max() < rounding
        assert torch.linalg.slogdet(R.to(F64)).sign > 0


@pytest.mark.parametrize("limit", [0.01, 0.5, 2.0, 3.0])
def test_each_plane_turns_by_at_most_the_limit(limit):
    for scale in (0.1, 3.0, 1e6):
        config, core = turning(2, scale, max_rotation_angle=limit)
        R = rotation(config, 4, core, 1.0)
        angles = torch.stack([torch.atan2(R[i, i + 1], R[i, i]).abs() for i in (0, 2)])
        assert angles.max() <= limit * (1 + 1e-12)
        if scale == 1e6:
            assert_close(angles, torch.full((2,), limit, dtype=F64))


def test_a_saturated_block_of_four_turns_by_what_the_design_says():
    config, core = turning(4, 0.0)
    with torch.no_grad():  # the parameters are the upper triangle by rows; these signs add up
        core.rot_v.copy_(torch.tensor([1.0, 1, 1, 1, -1, 1]) * 1e6)
    R, angles = rotation(config, 8, core, 1.0), []
    for signs in range(64):
        bits = torch.tensor([1.0 if signs >> i & 1 else -1.0 for i in range(6)])
        with torch.no_grad():
            core.rot_v.copy_(bits * 1e6)
        R = rotation(config, 8, core, 1.0)[:4, :4]
        angles.append(float(torch.linalg.eigvals(R).angle().abs().max()))
    assert max(angles) == pytest.approx(1.10, abs=0.005)


@pytest.mark.parametrize("basis", ["V", "U", "both", "none"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_small_cores_keep_their_accuracy(size, basis):
    config, r = surgery.AntiPaSTORot(block_size=size, rotate_basis=basis), 2 * size
    h, S = some(5, r, seed=3).float(), torch.linspace(3, 0.1, r)
    for scale in (1e-2, 1e-6, 1e-8):
        for shifted in (True, False):
            core = core_of(config, r, scale, dtype=torch.float32)
            if not shifted:
                with torch.no_grad():
                    core.delta_s.zero_()
            for coeff in (1.0, -0.5):
                found = delta(config, h, S, core, coeff)
                expected = first_order_or_exact(config, h, S, core, coeff)
                assert_close(found, expected.to(F64), torch.float32)


def first_order_or_exact(config: Variant, h: torch.Tensor, S: torch.Tensor, core: Core, coeff: float) -> torch.Tensor:
    """The reference with numpy's extended precision, in which ``R = I + 2X + 2X^2 + ...`` is a sum of few terms."""
    wide, r = np.longdouble, len(S)
    hw, Sw, shift = (array(t).astype(wide) for t in (h, S, core.delta_s))

    def turn(p: torch.Tensor | None) -> Any:
        E = np.zeros((r, r), dtype=wide)
        if p is None:
            return E
        bs, a = r // len(p), 2 * np.tan(wide(config.max_rotation_angle) / 2)
        for block, parameters in enumerate(array(p).astype(wide)):
            A = np.zeros((bs, bs), dtype=wide)
            A[np.triu_indices(bs, 1)] = parameters / 2
            X = coeff * a * np.tanh((A - A.T) / a) / 2
            term, total = 2 * X, np.zeros_like(X)
            for _ in range(60):
                total, term = total + term, term @ X
            E[block * bs : (block + 1) * bs, block * bs : (block + 1) * bs] = total
        return E

    E_v, E_u = (turn(getattr(core, name, None)) for name in ("rot_v", "rot_u"))
    w = hw @ E_v.T
    t = Sw * w + coeff * shift * (hw + w)
    return torch.from_numpy((t + (Sw * hw + t) @ E_u).astype(np.float64))


def test_the_two_references_agree():
    config = surgery.AntiPaSTORot(rotate_basis="both", block_size=3)
    h, S, core = some(5, 6), torch.linspace(3, 0.1, 6, dtype=F64), core_of(config, 6, 0.3)
    assert_close(first_order_or_exact(config, h, S, core, 0.7), expected_delta(config, h, S, core, 0.7))


@pytest.mark.parametrize("n", range(1, 17))
def test_inverse(n):
    A = 2 * some(3, n, n, seed=n)
    M = torch.eye(n, dtype=F64) - (A - A.mT)  # a positive definite symmetric part
    assert_close(inverse(M), torch.from_numpy(np.linalg.inv(array(M))))


@pytest.mark.parametrize(
    ("block", "limit", "r", "shape"),
    [
        (4, 10, 8, (2, 6)),
        (4, 3, 3, (1, 3)),
        (4, 1, 1, None),
        (8, 256, 256, (32, 28)),
        (5, 9, 5, (1, 10)),
        (1, 7, 7, None),
    ],
)
def test_rank_is_a_whole_number_of_blocks(block, limit, r, shape):
    config = surgery.AntiPaSTORot(block_size=block, rotate_basis="both")
    assert config.rank(limit) == r
    core = config.init_core(r, torch.Generator())
    assert core["delta_s"].shape == (r,)
    for name in ("rot_v", "rot_u"):
        assert (tuple(core[name].shape) == shape) if shape else (name not in core)


def test_rank_of_sites():
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 3), nn.Linear(3, 1), nn.Linear(1, 6))
    apply_surgery(model, "antipasto_rot", r=10, example_inputs=torch.randn(2, 12), progress=False)
    assert [len(site.factors.S) for site in sites(model).values()] == [8, 3, 1, 1]
    assert tuple(sites(model)["1"].core.rot_v.shape) == (1, 3)
    for site in sites(model).values():
        with torch.no_grad():
            site.core.delta_s += 0.5
    x = torch.randn(2, 12)
    assert not torch.equal(model(x), set_coeff(copy.deepcopy(model), 0.0)(x))


@pytest.mark.parametrize("limit", [1.0, 2.0])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_wide_rotations_in_float32(size, limit):
    config, core = turning(size, 50.0, dtype=torch.float32, max_rotation_angle=limit)
    for coeff in (1.0, 3.0):
        R = rotation(config, 2 * size, core, coeff, torch.float32)
        assert (R @ R.T - torch.eye(2 * size)).abs().max() < RELATIVE[torch.float32]
