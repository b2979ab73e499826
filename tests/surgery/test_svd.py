"""The factorisation against ``torch.linalg.svd`` in float64, over shapes, ranks, scales and spectra."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from surgery.errors import VariantError
from surgery.factors.exact_svd import GRAM_LIMIT
from surgery.factors.gram import BLOCK, gram_matrix
from surgery.factors.svd import factorise
from tests.support.spectra import with_spectrum
from tests.support.tolerance import assert_close, relative_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (1, 9), (9, 1), (5, 8), (8, 5), (8, 8), (3, 40), (40, 3))
sizes = st.integers(1, 24)


def check(weight: torch.Tensor, r: int) -> None:
    """Shapes, order, orthonormality, signs, singular values, and the best residual of rank r (Eckart and Young)."""
    found, W = factorise(weight, r), weight.double()
    S = torch.linalg.svdvals(W)
    eye = torch.eye(r, dtype=torch.float64)
    assert (found.U.shape, found.S.shape, found.Vh.shape) == ((len(W), r), (r,), (r, W.shape[1]))
    assert all(t.dtype == torch.float64 and t.is_contiguous() and torch.isfinite(t).all() for t in found[:3])
    assert (found.S >= 0).all()
    assert (found.S.diff() <= 0).all()
    assert_close(found.U.T @ found.U, eye, torch.float32)
    assert_close(found.Vh @ found.Vh.T, eye, torch.float32)
    error = max(relative_error(found.U.T @ found.U, eye), relative_error(found.Vh @ found.Vh.T, eye))
    assert_close(torch.tensor(1 + found.error).double(), torch.tensor(1 + error).double())
    assert (found.U.gather(0, found.U.abs().argmax(0, keepdim=True)) > 0).all()
    scale = S[0].clamp(min=torch.finfo(torch.float64).tiny)
    assert_close(found.S / scale, S[:r] / scale, torch.float32)
    residual = torch.linalg.norm((W - found.U.double() * found.S @ found.Vh.double()) / scale)
    best = torch.linalg.norm(S[r:] / scale)
    whole = torch.linalg.norm(S / scale)
    assert_close(torch.stack([residual, whole]), torch.stack([best, whole]), torch.float32)
    if S[0] > 0:
        assert_close(torch.tensor(found.energy), (1 - (best / whole).square()), torch.float32)


@given(sizes, sizes, st.integers(1, 24), st.integers(-30, 30), st.sampled_from((torch.float32, torch.float64)))
@example(1, 1, 1, 30, torch.float32)
@example(24, 24, 24, -30, torch.float64)
def test_any_shape_rank_and_scale(d_out, d_in, r, exponent, dtype):
    W = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(d_out * d_in)) * 10.0**exponent
    check(W.to(dtype), min(r, d_out, d_in))


@given(st.lists(st.floats(-9, 0), min_size=2, max_size=12), st.integers(1, 12), st.booleans())
@example([0.0, -4.9, -4.95, -4.99], 4, True)
@example([0.0, -5.9, -5.95, -5.99], 4, False)
@example([0.0, -6.0, -6.0001, -6.0002], 4, True)
def test_any_spectrum(exponents, r, wide):
    S = 10.0 ** torch.tensor(sorted(exponents, reverse=True), dtype=torch.float64)
    W = with_spectrum(14, 20, S) if wide else with_spectrum(20, 14, S)
    check(W.float(), min(r, len(S)))


@given(sizes, sizes, st.integers(0, 5), st.integers(1, 24))
def test_rank_deficient(d_out, d_in, rank, r):
    generator = torch.Generator().manual_seed(rank)
    W = torch.randn(d_out, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator)
    check(W, min(r, d_out, d_in))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_dtype(shape, dtype):
    W = torch.randn(shape).to(dtype)
    for r in {1, max(1, min(shape) // 2), min(shape)}:
        check(W, r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_zero(shape, dtype):
    check(torch.zeros(shape, dtype=dtype), min(shape))
    assert (factorise(torch.zeros(shape, dtype=dtype), 1).S == 0).all()


@pytest.mark.parametrize("S", [[1.0] * 6, [4.0, 2, 2, 2, 1, 1], [3.0, 3, 1e-3, 1e-3, 0, 0]])
@pytest.mark.parametrize("r", [1, 3, 6])
def test_repeated_singular_values(S, r):
    check(with_spectrum(9, 7, torch.tensor(S, dtype=torch.float64)).float(), r)


@pytest.mark.parametrize("scale", [torch.finfo(torch.float16).smallest_normal, 1.0, 6e4])
def test_the_range_of_float16(scale):
    check((torch.rand(6, 8) * scale).half(), 5)


def test_subnormal_entries():
    check(torch.randn(6, 8) * torch.finfo(torch.float32).smallest_normal / 100, 5)


@pytest.mark.parametrize("shape", SHAPES)
def test_deterministic_and_of_any_memory_layout(shape):
    W, r = torch.randn(shape), min(shape)
    found, again, strided = factorise(W, r), factorise(W.clone(), r), factorise(W.T.contiguous().T, r)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], again[:3], strict=True))
    assert_close(strided.U * strided.S @ strided.Vh, W.double(), torch.float32)


def test_the_sign_belongs_to_the_direction_and_not_to_the_matrix():
    W = torch.randn(7, 5)
    found, negated = factorise(W, 5), factorise(-W, 5)
    assert_close(negated.U, found.U)
    assert_close(negated.Vh, -found.Vh)


def test_factors_of_distinct_singular_values_are_those_of_the_full_decomposition():
    W = with_spectrum(9, 6, torch.tensor([6.0, 5, 4, 3, 2, 1], dtype=torch.float64))
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    for weight in (W, W.float()):
        found = factorise(weight, 6)
        signs = torch.sign((found.U * U).sum(0))
        assert_close(found.U, U * signs, torch.float32)
        assert_close(found.Vh, Vh * signs[:, None], torch.float32)


def test_the_method_depends_on_dtype_and_on_the_smallest_kept_value():
    S = torch.tensor([1.0, 1e-2, GRAM_LIMIT / 10], dtype=torch.float64)
    W = with_spectrum(8, 6, S)
    assert factorise(W, 2).method == "svd"
    assert factorise(W.float(), 2).method == "gram"
    assert factorise(W.float(), 3).method == "svd"


def test_gradients_and_the_weight_are_left_alone():
    W = torch.randn(6, 4, requires_grad=True)
    before = W.detach().clone()
    assert not factorise(W, 3).U.requires_grad
    assert torch.equal(W, before)
    assert W.grad is None


@given(st.integers(60, 120), st.integers(60, 120), st.integers(1, 14), st.floats(0, 2), st.integers(-20, 20))
def test_randomised_is_a_projection_near_the_best_one(d_out, d_in, r, decay, exponent):
    S = torch.arange(1, min(d_out, d_in) + 1, dtype=torch.float64) ** -decay
    W = (with_spectrum(d_out, d_in, S) * 10.0**exponent).float()
    found, true = factorise(W, r, "randomised"), torch.linalg.svdvals(W.double())
    assert found.method == "randomised" or decay > 1  # a spectrum of many decades is not one for float32
    assert (found.U.shape, found.Vh.shape) == ((d_out, r), (r, d_in))
    assert found.error < 1e-4
    assert (true[:r] + 1e-5 * true[0] >= found.S).all()
    assert (found.S.diff() <= 0).all()
    assert (found.U.gather(0, found.U.abs().argmax(0, keepdim=True)) > 0).all()
    residual = torch.linalg.norm(W.double() - found.U.double() * found.S @ found.Vh.double())
    assert residual <= 1.01 * true[r:].norm() + 1e-5 * true.norm()


def test_the_measured_residual_is_that_of_the_triples():
    W = with_spectrum(120, 100, torch.arange(1, 101, dtype=torch.float64) ** -0.3).float()
    for method, limit in (("exact", 1e-12), ("randomised", 1.0)):
        found = factorise(W, 30, method)
        U, S, Vh, D = found.U.double(), found.S, found.Vh.double(), W.double()
        true = torch.linalg.norm(torch.cat([D @ Vh.T - U * S, D.T @ U - Vh.T * S])) / S.norm()
        assert true < limit
        assert found.residual < limit
        if method == "randomised":
            assert 0.5 < found.residual / true < 2  # estimated with random vectors


@pytest.mark.parametrize(
    "W",
    [torch.zeros(60, 50), torch.ones(60, 50), torch.diag(10.0 ** -torch.arange(30.0)), torch.rand(9, 7)],
    ids=["zero", "one", "wide", "small"],
)
def test_randomised_gives_way_where_float32_is_not_enough(W):
    found = factorise(W, 5, "randomised")
    assert found.method in ("gram", "svd")
    check(W, 5)


@pytest.mark.parametrize("method", ["exact", "randomised"])
def test_the_same_on_repeated_runs(method):
    W = torch.randn(60, 50)
    found, again = (factorise(W, 7, method, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found[:3], again[:3], strict=True))
    assert found[3:] == again[3:]
    other = factorise(W, 7, method, seed=4)
    assert torch.equal(found.S, other.S) == (method == "exact")


@pytest.mark.parametrize(("d", "r", "method"), [(64, 4, "gram"), (2048, 8, "randomised"), (2047, 8, "gram")])
def test_auto_chooses_by_shape_and_rank(monkeypatch, d, r, method):
    for name in ("gram_triples", "randomised_triples"):
        monkeypatch.setattr(
            f"surgery.factors.svd.{name}",
            lambda W, r, seed=0: (torch.eye(len(W), r), torch.ones(r), torch.eye(r, len(W.T))),
        )
    assert factorise(torch.rand(d, d + 1), r).method == method


def test_an_unknown_method_is_refused():
    with pytest.raises(VariantError, match="auto, exact, randomised"):
        factorise(torch.ones(2, 2), 1, "fast")


def test_kept_directions_hold_their_share_of_the_energy():
    found = factorise(with_spectrum(9, 6, torch.tensor([3.0, 2, 1], dtype=torch.float64)).float(), 3)
    kept = found.keep(torch.tensor([0, 2]))
    assert_close(kept.S, torch.tensor([3.0, 1], dtype=torch.float64), torch.float32)
    assert_close(torch.tensor(kept.energy), torch.tensor(10 / 14), torch.float32)
    assert torch.equal(kept.U, found.U[:, [0, 2]])
    assert torch.equal(kept.Vh, found.Vh[[0, 2]])


def test_a_gram_matrix_holds_its_operand_no_longer_than_it_needs_it() -> None:
    gc.disable()  # what only a collection would free stays for many batches of a calibration
    try:
        A = torch.randn(32, 3 * BLOCK)
        held = weakref.ref(A)
        gram_matrix(A)
        del A
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("shape", [(5, 3), (70, 2 * BLOCK + 9), (300, 5 * BLOCK)])
def test_a_gram_matrix_is_the_whole_product(shape: tuple[int, int]) -> None:
    A = torch.randn(shape, dtype=torch.float64)
    for operand in (A, A.T.contiguous().T):
        assert_close(gram_matrix(operand), A.T @ A)
    H = torch.randn(len(A), len(A), dtype=torch.float64)
    H = H + H.T
    assert_close(gram_matrix(A, H @ A), A.T @ H @ A)
