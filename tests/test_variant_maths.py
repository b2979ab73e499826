"""What the mathematics of the variants promises: contractions, rotations, small and huge cores, kept preparations."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import surgery
from passes.tolerance import disagreement
from surgery import apply_surgery, set_coeff, sites
from surgery.core import Core
from surgery.graft import initial_core
from surgery.variants import REGISTRY, Variant, antipasto_ablate, antipasto_rot
from surgery.variants.antipasto_ablate import orthonormal
from tests.reference import array, reference_delta
from tests.tolerance import RELATIVE, assert_close

F64 = torch.float64
SUPPRESSING = [cls for cls in REGISTRY.values() if "suppress_only" in cls.__dataclass_fields__]


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def core_of(config: Variant, r: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = F64) -> Core:
    """A core of normal values of a given scale."""
    core = Core(config.init_core(r, torch.Generator().manual_seed(0)), dtype, torch.device("cpu"), config.frozen)
    with torch.no_grad():
        for i, parameter in enumerate(core.parameters()):
            parameter.copy_(scale * some(*parameter.shape, seed=seed + i))
    return core


def delta(config: Variant, h: torch.Tensor, S: torch.Tensor, core: Any, coeff: float) -> torch.Tensor:
    return config.delta(h, S, core, torch.tensor(coeff, dtype=S.dtype)).detach()


def expected_delta(config: Variant, h: torch.Tensor, S: torch.Tensor, core: Core, coeff: float) -> torch.Tensor:
    stored = {name: array(tensor) for name, tensor in core.tensors().items()}
    return torch.from_numpy(reference_delta(config, array(h), array(S), stored, float(np.float64(coeff))))


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


def ablated(seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5)), some(3, 6).float()
    variant = surgery.AntiPaSTOAblate(k=2, init_alpha=0.5)
    return apply_surgery(model, variant, target_modules="all-linear", example_inputs=x, progress=False), x


def without_kept(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output in grad mode, where nothing is kept."""
    return model(x).detach()


@pytest.fixture
def calls(monkeypatch):
    """Counts how often directions are made orthonormal."""
    seen: list[int] = []

    def counted(c: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return orthonormal(c)

    monkeypatch.setattr(antipasto_ablate, "orthonormal", counted)
    return seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_makes_directions_orthonormal_once(calls, mode):
    model, x = ablated()
    calls.clear()
    with mode():
        for _ in range(5):
            model(x)
        assert len(calls) == 2  # one for each site
        set_coeff(model, 0.3)
        model(x)
        assert len(calls) == 2
    model(x)
    assert len(calls) == 4


def change_data(model: nn.Module) -> None:
    for site in sites(model).values():
        site.core.c.data.copy_(some(*site.core.c.shape, seed=5))


def change_one_entry_of_data(model: nn.Module) -> None:
    sites(model)["0"].core.c.data[0, 0] += 1


def change_alpha(model: nn.Module) -> None:
    sites(model)["0"].core.alpha.data.fill_(0.9)


def load(model: nn.Module) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items() if ".c" in name}, strict=False)


def assign(model: nn.Module) -> None:
    state = {name: value + 1 for name, value in model.state_dict().items() if name.endswith("core.c")}
    model.load_state_dict(state, strict=False, assign=True)


def optimise(model: nn.Module) -> None:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    with torch.enable_grad():
        model(some(3, 6).float()).square().sum().backward()
    optimiser.step()


def replace(model: nn.Module) -> None:
    core = sites(model)["0"].core
    core.c = nn.Parameter(core.c.detach().roll(1, 0))


def cast(model: nn.Module) -> None:
    model.double()


@pytest.mark.parametrize(
    "change", [change_data, change_one_entry_of_data, change_alpha, load, assign, optimise, replace, cast]
)
def test_inference_notices_that_a_core_has_changed(change):
    model, x = ablated()
    with torch.no_grad():
        before = model(x)
        change(model)
        x = x.to(next(model.parameters()).dtype)
        after = model(x)
        again = model(x)
    assert torch.equal(after, again)
    assert disagreement(after, without_kept(model, x)) is None
    assert change is cast or not torch.equal(after, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_inference_keeps_has_no_graph(mode):
    model, x = ablated()
    with mode():
        model(x)
        for site in sites(model).values():
            assert not site.core.prepared(site.variant).basis.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_copies_and_pickles_of_a_model_that_has_run(mode):
    model, x = ablated()
    with mode():
        expected = model(x)
    twin = copy.deepcopy(model)
    cores = {key: pickle.loads(pickle.dumps(site.core)) for key, site in sites(model).items()}
    whole = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(twin(x), expected)
        assert torch.equal(whole(x), expected)
        change_data(twin)
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)
        for key, site in sites(model).items():
            assert all(torch.equal(t, cores[key].tensors()[n]) for n, t in site.core.tensors().items())
    model(x).square().sum().backward()
    assert all(site.core.c.grad.abs().max() > 0 for site in sites(model).values())


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
    assert_close(antipasto_rot.inverse(M), torch.from_numpy(np.linalg.inv(array(M))))


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


@pytest.mark.parametrize("limit", [1.0, 2.0])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_wide_rotations_in_float32(size, limit):
    config, core = turning(size, 50.0, dtype=torch.float32, max_rotation_angle=limit)
    for coeff in (1.0, 3.0):
        R = rotation(config, 2 * size, core, coeff, torch.float32)
        assert (R @ R.T - torch.eye(2 * size)).abs().max() < RELATIVE[torch.float32]


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


def test_refresh_drops_what_inference_keeps():
    model = nn.Sequential(nn.Linear(6, 5))
    apply_surgery(model, surgery.AntiPaSTOAblate(r=4, k=2), target_modules="all-linear", progress=False)
    core = sites(model)["0"].core
    with torch.no_grad():
        model(torch.ones(2, 6))
    assert "_prepared" in vars(core)
    assert surgery.refresh(model) is model
    assert "_prepared" not in vars(core)
