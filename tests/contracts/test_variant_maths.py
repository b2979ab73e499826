"""What the mathematics of the variants promises: contractions, rotations, small and huge cores, kept preparations."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.cores.ablate import orthonormal
from surgery.modules.core import Core
from surgery.planning.adapter_init import initial_core
from surgery.variants import REGISTRY
from tests.support.core_deltas import F64, core_of, delta, expected_delta, some
from tests.support.reference import array, reference_delta
from tests.support.tolerance import assert_close

SUPPRESSING = [cls for cls in REGISTRY.values() if "suppress_only" in cls.__dataclass_fields__]


def columns(kind: str, r: int, k: int) -> torch.Tensor:
    """Directions (r, k), some of which depend on others."""
    c = some(r, k, seed=k)
    if kind == "equal":
        c[:, k // 2 :] = c[:, :1]
    elif kind == "zero":
        c[:, :: max(2, k)] = 0
    elif kind == "sum":
        c[:, -1] = c[:, :-1].sum(dim=1)
    elif kind == "tiny":
        c *= 1e-30
    return c


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["full", "equal", "zero", "sum", "tiny"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_an_ablation_is_a_contraction(k, kind, dtype):
    r, config = 8, surgery.AntiPaSTOAblate(k=k)
    core = SimpleNamespace(c=columns(kind, r, k).to(dtype), alpha=torch.linspace(-0.5, 2, k).to(dtype))
    ones, rounding = torch.ones(r, dtype=dtype), 20 * torch.finfo(dtype).eps
    for coeff in (-3.0, 0.0, 0.3, 1.0, 5.0):
        M = torch.eye(r, dtype=dtype) + delta(config, torch.eye(r, dtype=dtype), ones, core, coeff)
        assert (M - M.T).abs().max() <= rounding
        values = torch.linalg.eigvalsh(M.to(F64))
        assert -rounding <= values.min()
        assert values.max() <= 1 + rounding
        if coeff <= 0:
            assert torch.equal(M, torch.eye(r, dtype=dtype))


def test_allow_amplify_leaves_the_contraction():
    core = SimpleNamespace(c=some(6, 1), alpha=torch.ones(1, dtype=F64))
    eye, ones = torch.eye(6, dtype=F64), torch.ones(6, dtype=F64)
    for coeff in (-3.0, 2.0):
        M = eye + delta(surgery.AntiPaSTOAblate(allow_amplify=True), eye, ones, core, coeff)
        values = torch.linalg.eigvalsh(M)
        assert_close(values[-1] if coeff < 0 else values[0], torch.tensor(1 - coeff, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize(("r", "k"), [(1, 1), (5, 2), (16, 3), (16, 16), (40, 31)])
def test_orthonormal_is_the_q_of_qr(r, k, condition, dtype):
    U, _, V = torch.linalg.svd(some(r, k), full_matrices=False)
    c = ((U * torch.logspace(0, -np.log10(condition), k, dtype=F64)) @ V).to(dtype)
    found, (Q, R) = orthonormal(c).to(F64), np.linalg.qr(array(c))
    expected = torch.from_numpy(Q * np.sign(np.diag(R)))
    eps = torch.finfo(dtype).eps
    assert (found.T @ found - torch.eye(k, dtype=F64)).abs().max() <= 100 * eps
    assert (found - expected).abs().max() <= 100 * eps * condition


@pytest.mark.parametrize("kind", ["equal", "zero", "sum"])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_orthonormal_drops_dependent_columns(k, kind):
    for dtype in (torch.float64, torch.float32):
        c = columns(kind, 8, k).to(dtype)
        found, rank = orthonormal(c).to(F64), int(np.linalg.matrix_rank(array(c), tol=1e-4))
        rounding = 100 * torch.finfo(dtype).eps
        lengths = found.norm(dim=0)
        assert ((lengths < rounding) | ((lengths - 1).abs() < rounding)).all()
        assert int((lengths > 0.5).sum()) == rank
        projector = found @ found.T
        assert (projector @ projector - projector).abs().max() < rounding
        assert (projector @ c.to(F64) - c.to(F64)).abs().max() < rounding * c.abs().max()


@given(st.sampled_from(SUPPRESSING), st.floats(0, 20), st.sampled_from([1e-4, 1.0, 40.0]), st.integers(0, 99))
def test_suppress_only_never_amplifies(cls, coeff, scale, seed):
    r, b = 6, 2
    config = cls(suppress_only=True, **({"block": b} if "block" in cls.__dataclass_fields__ else {}))
    core = core_of(config, r, scale, seed)
    with torch.no_grad():  # only g is clamped
        for name, parameter in core.named_parameters():
            if name != "g":
                parameter.zero_()
    S, eye = torch.linspace(3, 0.1, r, dtype=F64), torch.eye(r, dtype=F64)
    effective = torch.diag(S) + delta(config, eye, S, core, coeff)
    clamped = torch.diagonal(effective)[r - len(core.g) :]
    assert torch.equal(effective, torch.diag(torch.diagonal(effective)))
    assert (clamped >= 0).all()
    assert (clamped <= S[r - len(core.g) :]).all()
    values = torch.linalg.svdvals(effective[r - len(core.g) :, r - len(core.g) :])
    assert (values <= S[r - len(core.g)] * (1 + 1e-12)).all()


def steering(r: int = 5, seed: int = 0) -> Any:
    return SimpleNamespace(direction=nn.functional.normalize(some(r, seed=seed), dim=0))


def test_the_sign_of_the_cosine_is_kept():
    config, S, core = surgery.SSpace(), torch.linspace(3, 0.5, 5, dtype=F64), steering()
    along = core.direction / S.sqrt()
    for sign in (1.0, -1.0):
        assert_close(delta(config, sign * 7 * along, S, core, 2.0), sign * 2.0 * S.sqrt() * core.direction)
    across = some(5, seed=4) - (some(5, seed=4) @ core.direction) * core.direction
    assert delta(config, across / S.sqrt(), S, core, 1.0).abs().max() < 1e-14


@given(st.floats(-30, 4), st.integers(0, 99))
def test_the_gate_does_not_depend_on_the_scale_of_the_input(exponent, seed):
    config, S, core, h = surgery.SSpace(), torch.linspace(3, 0.5, 5, dtype=F64), steering(), some(4, 5, seed=seed)
    expected = delta(config, h, S, core, 1.3)
    assert_close(delta(config, h * 10**exponent, S, core, 1.3), expected)
    assert_close(delta(config, -h * 10**exponent, S, core, 1.3), -expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extreme_inputs_of_a_steering_are_finite(dtype):
    wide = F64 if dtype == F64 else torch.float32
    config, core = surgery.SSpace(), SimpleNamespace(direction=steering().direction.to(wide))
    S = torch.tensor([3.0, 1.0, 0.5, 0.0, 0.0]).to(wide)
    huge = 6e4 if dtype == torch.float16 else 1e30
    ordinary = some(5, seed=2)
    h = torch.stack([0 * ordinary, 1e-30 * ordinary, huge * ordinary.sign(), ordinary, torch.eye(5, dtype=F64)[4]])
    h = h.to(dtype).requires_grad_(True)
    found = config.delta(h, S, core, torch.ones((), dtype=wide))
    assert torch.isfinite(found).all()
    assert torch.equal(found[0], torch.zeros(5, dtype=dtype))
    assert torch.equal(found[4], torch.zeros(5, dtype=dtype))  # no part of it is seen
    assert torch.equal(found[:, 3:], torch.zeros(5, 2, dtype=dtype))
    found.sum().backward()
    assert not torch.isnan(h.grad[[2, 3]]).any()
    stored = {"direction": array(core.direction)}
    assert_close(found.detach(), torch.from_numpy(reference_delta(config, array(h), array(S), stored, 1.0)))


def test_the_gradient_of_a_steering_at_zero_is_finite():
    h = torch.zeros(3, 5, requires_grad=True)
    core = SimpleNamespace(direction=steering().direction.float())
    surgery.SSpace().delta(h, torch.ones(5), core, torch.ones(())).sum().backward()
    assert torch.isfinite(h.grad).all()


@pytest.mark.parametrize("r", [1, 5, 8, 9])
def test_arrow_of_a_site_that_is_all_block(r):
    config = surgery.AntiPaSTOArrow(block=8)
    core = core_of(config, r)
    assert tuple(core.m.shape) == (min(r, 8),) * 2
    assert hasattr(core, "g") == (r > 8)
    h, S = some(4, r, seed=9), torch.linspace(3, 0.1, r, dtype=F64)
    assert_close(delta(config, h, S, core, 0.7), expected_delta(config, h, S, core, 0.7))
    if r <= 8:
        assert_close(delta(config, h, S, core, 0.7), delta(surgery.LoRAXS(), h, S, core, 0.7))


@pytest.mark.parametrize("r", [1, 6, 64])
def test_initial_low_rank_map(r):
    core = surgery.AntiPaSTODPLR(k=8).init_core(r, torch.Generator().manual_seed(0))
    assert (tuple(core["g"].shape), tuple(core["a"].shape), tuple(core["b"].shape)) == ((r,), (8, r), (r, 8))
    assert not core["g"].any()
    assert not core["b"].any()
    bound = r**-0.5
    assert core["a"].abs().max() <= bound
    assert core["a"].abs().max() > 0.5 * bound
    assert core["a"].min() < 0 < core["a"].max()
    if r == 64:
        assert float(core["a"].std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_initial_shift_and_directions():
    shift = surgery.AntiPaSTORot(init_delta_s=4e-4).init_core(4096, torch.Generator().manual_seed(0))["delta_s"]
    assert float(shift.mean()) == pytest.approx(4e-4, rel=0.05)
    assert float(shift.std()) == pytest.approx(4e-4, rel=0.05)
    core = surgery.AntiPaSTOAblate(k=4, init_alpha=0.2).init_core(1024, torch.Generator().manual_seed(0))
    assert float(core["c"].std()) == pytest.approx(1024**-0.5, rel=0.05)
    assert_close(core["alpha"], torch.full((4,), 0.2))


@pytest.mark.parametrize("r", [1, 4, 7])
def test_a_full_core_is_any_map(r):
    config, S, h = surgery.LoRAXS(), torch.linspace(3, 0.1, r, dtype=F64), some(3, r, seed=1)
    core = config.init_core(r, torch.Generator())
    assert list(core) == ["m"]
    assert torch.equal(core["m"], torch.zeros(r, r))
    m = some(r, r, seed=2)
    assert_close(delta(config, h, S, SimpleNamespace(m=m), -2.0), -2.0 * (h @ torch.diag(S)) @ m.T)


WRONG = [
    (surgery.AntiPaSTORot, "rotate_basis", ["W", "v", None, ""]),
    (surgery.AntiPaSTORot, "block_size", [0, -4, 2.0, True, "4"]),
    (surgery.AntiPaSTORot, "max_rotation_angle", [4, 0, -0.5, float("nan"), float("inf"), "0.5"]),
    (surgery.AntiPaSTORot, "init_delta_s", [-1e-4, None, float("nan")]),
    (surgery.AntiPaSTOAblate, "k", [0, -1, 1.0, True]),
    (surgery.AntiPaSTOAblate, "init_alpha", [2, -0.1, None, float("nan")]),
    (surgery.AntiPaSTOAblate, "cov_eps", [-1, None, float("nan")]),
    (surgery.AntiPaSTOCorDA, "cov_eps", [-1, "1e-3", float("nan")]),
    (surgery.AntiPaSTOASVD, "cov_eps", [-1e-9]),
    (surgery.AntiPaSTOArrow, "block", [0, 2.5, False]),
    (surgery.AntiPaSTODPLR, "k", [0, -8, "8"]),
    (surgery.AntiPaSTO, "pool", ["max", None]),
    (surgery.LoRAXS, "pool", ["mean"]),
    *[(cls, "svd_method", ["fast", None]) for cls in REGISTRY.values()],
]


@pytest.mark.parametrize(("cls", "field", "values"), WRONG, ids=lambda v: getattr(v, "name", None) or str(v))
def test_a_wrong_value_is_refused_by_name(cls, field, values):
    for value in values:
        with pytest.raises(surgery.VariantError, match=rf"^{field} must be .* found "):
            cls(**{field: value})


def test_two_seeds_give_two_random_cores_and_one_gives_the_same():
    def core(seed: int, key: str = "a") -> torch.Tensor:
        return initial_core(surgery.AntiPaSTODPLR(), key, 8, seed)["a"]

    assert torch.equal(core(3), core(3))
    assert not torch.equal(core(3), core(4))
    assert not torch.equal(core(3), core(2**32 + 3))
    assert not torch.equal(core(3), core(3, "b"))


@pytest.mark.parametrize("name", ["antipasto", "antipasto_ablate", "antipasto_dplr", "antipasto_rot", "sspace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_exact_zero_at_coeff_zero_where_products_would_overflow(name, dtype):
    config = REGISTRY[name]()
    r = config.rank(8)
    core = Core(config.init_core(r, torch.Generator()), torch.float32, torch.device("cpu"), config.frozen)
    with torch.no_grad():
        for tensor in core.tensors().values():
            tensor.fill_(0.9)
    h = torch.full((3, 2, r), float(torch.finfo(dtype).max) / 2).to(dtype)
    for coeff in (torch.zeros(()), torch.zeros(3, 1, 1)):
        assert torch.equal(config.delta(h, torch.linspace(40, 1, r), core, coeff), torch.zeros_like(h))


def test_numpy_integers_and_torch_dtypes_are_taken():
    config = surgery.AntiPaSTO(r=np.int64(4), factors_dtype=torch.float32)
    assert config == surgery.AntiPaSTO(r=4, factors_dtype="float32")
    with pytest.raises(surgery.VariantError, match="cov_eps must be a number"):
        surgery.AntiPaSTOCorDA(cov_eps=float("inf"))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_an_adapter_of_a_model_that_was_cast_loads_again(tmp_path, cast):
    for config, start in (
        (surgery.AntiPaSTO(r=4, factors_dtype="float32"), "float"),
        (surgery.AntiPaSTO(r=4), "double"),
    ):
        model = getattr(torch.nn.Sequential(torch.nn.Linear(6, 5)), start)()
        fresh = getattr(getattr(copy.deepcopy(model), start)(), cast)()
        surgery.apply_surgery(model, config, progress=False)
        surgery.sites(model)["0"].core.g.data.normal_()
        getattr(model, cast)()
        surgery.save_adapter(model, tmp_path / "adapter")
        surgery.load_adapter(fresh, tmp_path / "adapter")
        x = torch.randn(3, 6).to(fresh[0].weight.dtype)
        assert torch.equal(fresh(x), model(x))


def test_a_variant_without_a_weight_refuses_weights_that_are_read_and_leaves_them_out_of_groups():
    layer, x = torch.nn.TransformerEncoderLayer(24, 4, 48, batch_first=True).eval(), torch.randn(4, 8, 24)
    contrast = surgery.Contrast([x + 1], [x])
    with pytest.raises(surgery.VariantError, match="no place for it"):
        surgery.apply_surgery(layer, "sspace", r=4, calibration=contrast, progress=False)

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.down = layer, torch.nn.Linear(24, 24)

        def forward(self, x):
            x = self.layer(x)
            return x + self.down(torch.relu(x))

    model = Both().eval()
    with pytest.warns(UserWarning, match="left alone"):
        surgery.apply_surgery(model, "sspace", r=4, calibration=contrast, progress=False)
    assert set(surgery.sites(model)) == {"down"}
    assert torch.isfinite(model(x)).all()
    with pytest.raises(surgery.VariantError, match=r"'layer\.linear2'.*exclude_modules"):
        surgery.apply_surgery(model, "sspace", r=4, calibration=contrast, target_modules=["linear2"], progress=False)
